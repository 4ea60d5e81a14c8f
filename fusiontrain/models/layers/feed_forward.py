"""SwiGLU feed-forward (arXiv 2002.05202) with weights per modality group."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.models.layers.untied import UntiedLinear
from fusiontrain.models.recipes.recipe import Groups
from fusiontrain_kernels.swiglu import swiglu


class FeedForward(nn.Module):
    """x [T, D] -> [T, D], width F inside."""

    def __init__(self, groups: Groups, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate = UntiedLinear(groups, dim, ffn_dim)
        self.up = UntiedLinear(groups, dim, ffn_dim)
        self.down = UntiedLinear(groups, ffn_dim, dim)

    def forward(self, x: torch.Tensor, modality_bounds: tuple[int, ...]) -> torch.Tensor:
        return self.down(swiglu(self.gate(x, modality_bounds), self.up(x, modality_bounds)), modality_bounds)
