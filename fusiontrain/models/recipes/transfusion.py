"""Transfusion (arXiv 2408.11039): one transformer for text tokens and noised image patches, every weight shared (section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from fusiontrain.config.schema import ModelConfig
from fusiontrain.models.recipes.recipe import Recipe, untie


def transfusion(model: ModelConfig, modalities: Sequence[str]) -> Recipe:
    return untie((), modalities)
