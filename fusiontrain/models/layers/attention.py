"""Self-attention whose projections are per modality and whose softmax is one over all modalities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fusiontrain.models.layers.layout import Layout
from fusiontrain.models.layers.untied import UntiedHeadLayerNorm, UntiedLinear, UntiedRMSNorm
from fusiontrain.models.recipes.recipe import Groups, Recipe
from fusiontrain.models.shape import ModelShape
from fusiontrain_kernels.qk_norm_rope import qk_norm_rope
from fusiontrain_kernels.rope import rope

HEAD_NORM_EPS = 1e-5
"""Of Chameleon's layer norms, whatever its other norms have."""

Attend = Callable[..., torch.Tensor]
"""(q [T, H, Dh], k [T, K, Dh], v [T, K, Dh]) -> [T, H, Dh]. Training passes the masked kernel, generation passes its cache. Behind a prefix of F
other rows it takes their keys and values too, (q, k, v, k [F, K, Dh], v [F, K, Dh])."""


class Attention(nn.Module):
    """x [T, D] -> [T, D], and its keys and values, [T, K, Dh] each. H query heads in K groups of shared keys and values.

    Queries and keys may be normed per head before they are turned: `shape.qk_norm` is rms, layer or none.
    """

    def __init__(self, recipe: Recipe, shape: ModelShape) -> None:
        super().__init__()
        dim, self.head_dim = shape.dim, shape.head_dim
        self.q = UntiedLinear(recipe.qkv, dim, shape.num_heads * shape.head_dim)
        self.k = UntiedLinear(recipe.qkv, dim, shape.num_kv_heads * shape.head_dim)
        self.v = UntiedLinear(recipe.qkv, dim, shape.num_kv_heads * shape.head_dim)
        self.o = UntiedLinear(recipe.o, shape.num_heads * shape.head_dim, dim)
        self.q_norm = _head_norm(recipe.qk_norm, shape, shape.num_heads)
        self.k_norm = _head_norm(recipe.qk_norm, shape, shape.num_kv_heads)

    def forward(
        self, x: torch.Tensor, layout: Layout, attend: Attend, *prefix: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = self.q(x, layout).unflatten(-1, (-1, self.head_dim))  # [T, H, Dh]
        k = self.k(x, layout).unflatten(-1, (-1, self.head_dim))  # [T, K, Dh]
        v = self.v(x, layout).unflatten(-1, (-1, self.head_dim))
        q, k = self._turned(q, k, layout)
        return self.o(attend(q, k, v, *prefix).flatten(1), layout), k, v

    def _turned(self, q: torch.Tensor, k: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, normed where this model norms them, at their rotary positions."""
        cos, sin, impl = layout.cos, layout.sin, layout.kernels.rope
        if isinstance(self.q_norm, UntiedRMSNorm) and isinstance(self.k_norm, UntiedRMSNorm):
            rows = layout.rows[self.q_norm.groups]
            norms = (self.q_norm.weights, self.k_norm.weights)
            return qk_norm_rope(q, k, *norms, cos, sin, rows.bounds, self.q_norm.eps, offsets=rows.offsets, impl=impl)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, layout), self.k_norm(k, layout)
        return rope(q, cos, sin, impl=impl), rope(k, cos, sin, impl=impl)


def _head_norm(groups: Groups, shape: ModelShape, num_heads: int) -> UntiedRMSNorm | UntiedHeadLayerNorm | None:
    if shape.qk_norm == "rms":
        return UntiedRMSNorm(groups, shape.head_dim, shape.norm_eps)
    return UntiedHeadLayerNorm(groups, num_heads, shape.head_dim, HEAD_NORM_EPS) if shape.qk_norm == "layer" else None
