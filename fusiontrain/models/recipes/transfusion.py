"""Transfusion (arXiv 2408.11039): one transformer for text tokens and noised image patches, every weight shared (section 3)."""

from __future__ import annotations

from fusiontrain.config.schema import ModelConfig
from fusiontrain.models.recipes.recipe import ONE_FOR_ALL, Recipe


def transfusion(model: ModelConfig) -> Recipe:
    return Recipe(attention=ONE_FOR_ALL, feed_forward=ONE_FOR_ALL, final_norm=ONE_FOR_ALL)
