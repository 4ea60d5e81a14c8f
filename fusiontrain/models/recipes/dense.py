"""A text-only Llama: one set of weights, next-token loss. What LMFusion starts from and is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from fusiontrain.config.schema import ModelConfig
from fusiontrain.models.recipes.recipe import Recipe, untie


def dense(model: ModelConfig, modalities: Sequence[str]) -> Recipe:
    return untie((), modalities)
