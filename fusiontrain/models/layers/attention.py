"""Self-attention whose projections are per modality and whose softmax is one over all modalities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fusiontrain.models.layers.untied import UntiedLinear
from fusiontrain.models.recipes.recipe import Groups
from fusiontrain_kernels.rope import rope

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q [T, H, Dh], k [T, K, Dh], v [T, K, Dh]) -> [T, H, Dh]. Training passes the masked kernel, generation passes its cache."""


@dataclass(frozen=True)
class Layout:
    """What every layer needs to know of the rows it is given: modality borders and rotary angles [T, Dh]."""

    modality_bounds: tuple[int, ...]
    cos: torch.Tensor
    sin: torch.Tensor


class Attention(nn.Module):
    """x [T, D] -> [T, D]. H query heads in K groups of shared keys and values."""

    def __init__(self, groups: Groups, dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = UntiedLinear(groups, dim, num_heads * head_dim)
        self.k = UntiedLinear(groups, dim, num_kv_heads * head_dim)
        self.v = UntiedLinear(groups, dim, num_kv_heads * head_dim)
        self.o = UntiedLinear(groups, num_heads * head_dim, dim)

    def forward(self, x: torch.Tensor, layout: Layout, attend: Attend) -> torch.Tensor:
        bounds = layout.modality_bounds
        q = self.q(x, bounds).unflatten(-1, (-1, self.head_dim))  # [T, H, Dh]
        k = self.k(x, bounds).unflatten(-1, (-1, self.head_dim))  # [T, K, Dh]
        v = self.v(x, bounds).unflatten(-1, (-1, self.head_dim))
        out = attend(rope(q, layout.cos, layout.sin), rope(k, layout.cos, layout.sin), v)
        return self.o(out.flatten(1), bounds)
