"""The transformer block that every recipe is made of."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.models.layers.attention import Attend, Attention
from fusiontrain.models.layers.feed_forward import FeedForward
from fusiontrain.models.layers.layout import Layout
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

    def forward(self, x: torch.Tensor, layout: Layout, attend: Attend) -> torch.Tensor:
        update = self.attention(self.attention_norm(x, layout), layout, attend)
        normed, x = self.feed_forward_norm.add(x, update, layout)
        return x + self.feed_forward(normed, layout)
