"""SwiGLU feed-forward (arXiv 2002.05202) with weights per modality group."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.models.layers.layout import Layout
from fusiontrain.models.layers.untied import UntiedLinear
from fusiontrain.models.recipes.recipe import Groups
from fusiontrain_kernels.modality_gemm import modality_swiglu
from fusiontrain_kernels.swiglu import swiglu


class FeedForward(nn.Module):
    """x [T, D] -> [T, D], width F inside."""

    def __init__(self, groups: Groups, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.groups = groups
        self.gate = UntiedLinear(groups, dim, ffn_dim)
        self.up = UntiedLinear(groups, dim, ffn_dim)
        self.down = UntiedLinear(groups, ffn_dim, dim)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        kernels, rows = layout.kernels, layout.rows[self.groups]
        if kernels.fuses_swiglu:
            hidden = modality_swiglu(x, self.gate.weights, self.up.weights, rows.bounds, offsets=rows.offsets, impl=kernels.gemm)
        else:
            hidden = swiglu(self.gate(x, layout), self.up(x, layout), impl=kernels.swiglu)
        return self.down(hidden, layout)
