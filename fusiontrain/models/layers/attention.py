"""Self-attention whose projections are per modality and whose softmax is one over all modalities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fusiontrain.models.layers.layout import Layout
from fusiontrain.models.layers.untied import UntiedLinear
from fusiontrain.models.recipes.recipe import Groups
from fusiontrain_kernels.rope import rope

Attend = Callable[..., torch.Tensor]
"""(q [T, H, Dh], k [T, K, Dh], v [T, K, Dh]) -> [T, H, Dh]. Training passes the masked kernel, generation passes its cache. Behind a prefix of F
other rows it takes their keys and values too, (q, k, v, k [F, K, Dh], v [F, K, Dh])."""


class Attention(nn.Module):
    """x [T, D] -> [T, D], and its keys and values, [T, K, Dh] each. H query heads in K groups of shared keys and values."""

    def __init__(self, groups: Groups, dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = UntiedLinear(groups, dim, num_heads * head_dim)
        self.k = UntiedLinear(groups, dim, num_kv_heads * head_dim)
        self.v = UntiedLinear(groups, dim, num_kv_heads * head_dim)
        self.o = UntiedLinear(groups, num_heads * head_dim, dim)

    def forward(
        self, x: torch.Tensor, layout: Layout, attend: Attend, *prefix: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = self.q(x, layout).unflatten(-1, (-1, self.head_dim))  # [T, H, Dh]
        k = self.k(x, layout).unflatten(-1, (-1, self.head_dim))  # [T, K, Dh]
        v = self.v(x, layout).unflatten(-1, (-1, self.head_dim))
        q, k = (rope(heads, layout.cos, layout.sin, impl=layout.kernels.rope) for heads in (q, k))
        return self.o(attend(q, k, v, *prefix).flatten(1), layout), k, v
