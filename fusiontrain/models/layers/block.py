"""The transformer block that every recipe is made of."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.models.layers.attention import Attend, Attention
from fusiontrain.models.layers.dropout import keyed_dropout
from fusiontrain.models.layers.feed_forward import FeedForward
from fusiontrain.models.layers.layout import Layout
from fusiontrain.models.layers.prefix import Prefix
from fusiontrain.models.layers.untied import UntiedRMSNorm
from fusiontrain.models.recipes.recipe import Recipe
from fusiontrain.models.shape import ModelShape


class Block(nn.Module):
    """Pre-norm, as Llama: x + attention(norm(x)), then x + feed_forward(norm(x)). x [T, D] -> [T, D].

    With `norm_position: post`, as Swin, MoT and the larger Chameleon: x + norm(attention(x)), then x + norm(feed_forward(x)).

    The second norm adds the attention's output in the same pass. The first one could add the feed-forward's of the block before, but then
    two tensors would pass between blocks, and recomputation would keep both.
    """

    def __init__(self, shape: ModelShape, recipe: Recipe, number: int) -> None:
        super().__init__()
        self.norms_after, self.dropout, self.number = shape.norm_position == "post", shape.dropout, number
        self.attention_norm = UntiedRMSNorm(recipe.attention_norm, shape.dim, shape.norm_eps)
        self.attention = Attention(recipe, shape)
        self.feed_forward_norm = UntiedRMSNorm(recipe.feed_forward_norm, shape.dim, shape.norm_eps)
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
        if self.norms_after:
            update, k, v = self.attention(x, layout, attend, *prefix)
            x = x + self.attention_norm(self._drop(update, layout, 0), layout)
            return x + self.feed_forward_norm(self._drop(self.feed_forward(x, layout), layout, 1), layout), k, v
        update, k, v = self.attention(self.attention_norm(x, layout), layout, attend, *prefix)
        normed, x = self.feed_forward_norm.add(x, self._drop(update, layout, 0), layout)
        return x + self._drop(self.feed_forward(normed, layout), layout, 1), k, v

    def _drop(self, x: torch.Tensor, layout: Layout, sublayer: int) -> torch.Tensor:
        """Dropout behind a sublayer, where the layout has keys for it: in training."""
        if self.dropout == 0 or layout.row_keys is None:
            return x
        return keyed_dropout(x, layout.row_keys, 2 * self.number + sublayer, self.dropout)
