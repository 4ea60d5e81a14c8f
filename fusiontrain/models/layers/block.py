"""The transformer block that every recipe is made of."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.models.layers.attention import Attend, Attention
from fusiontrain.models.layers.feed_forward import FeedForward
from fusiontrain.models.layers.layout import Layout
from fusiontrain.models.layers.prefix import Prefix
from fusiontrain.models.layers.untied import UntiedRMSNorm
from fusiontrain.models.recipes.recipe import Recipe
from fusiontrain.models.shape import ModelShape


class Block(nn.Module):
    """Pre-norm, as Llama: x + attention(norm(x)), then x + feed_forward(norm(x)). x [T, D] -> [T, D].

    The second norm adds the attention's output in the same pass. The first one could add the feed-forward's of the block before, but then
    two tensors would pass between blocks, and recomputation would keep both.
    """

    def __init__(self, shape: ModelShape, recipe: Recipe) -> None:
        super().__init__()
        self.attention_norm = UntiedRMSNorm(recipe.attention, shape.dim, shape.norm_eps)
        self.attention = Attention(recipe.attention, shape.dim, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self.feed_forward_norm = UntiedRMSNorm(recipe.feed_forward, shape.dim, shape.norm_eps)
        self.feed_forward = FeedForward(recipe.feed_forward, shape.dim, shape.ffn_dim)

    def forward(
        self, x: torch.Tensor, layout: Layout, attend: Attend, prefix: Prefix | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """prefix: F rows that x attends to and that nothing trains -> x and those rows [F, D].

        One call for both, so that an engine gathers the block's weights once. Of the prefix only keys and values stay for the backward.
        """
        if prefix is None:
            return self.forward_live(x, layout, attend), None
        with torch.no_grad():
            rows, keys, values = self._compute(prefix.rows, prefix.layout, prefix.attend)
        return self.forward_live(x, layout, attend, keys, values), rows

    def forward_live(self, x: torch.Tensor, layout: Layout, attend: Attend, *prefix: torch.Tensor) -> torch.Tensor:
        """The part that an engine may compute again in the backward: rows with a gradient. prefix: keys and values of the rows before them."""
        return self._compute(x, layout, attend, *prefix)[0]

    def _compute(
        self, x: torch.Tensor, layout: Layout, attend: Attend, *prefix: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> rows [T, D], and their keys and values [T, K, Dh]."""
        update, k, v = self.attention(self.attention_norm(x, layout), layout, attend, *prefix)
        normed, x = self.feed_forward_norm.add(x, update, layout)
        return x + self.feed_forward(normed, layout), k, v
