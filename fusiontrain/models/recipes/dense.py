"""A text-only Llama: one set of weights, next-token loss. What LMFusion starts from and is compared with."""

from __future__ import annotations

from fusiontrain.config.schema import ModelConfig
from fusiontrain.models.recipes.recipe import ONE_FOR_ALL, Recipe


def dense(model: ModelConfig) -> Recipe:
    return Recipe(attention=ONE_FOR_ALL, feed_forward=ONE_FOR_ALL, final_norm=ONE_FOR_ALL)
