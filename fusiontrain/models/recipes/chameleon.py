"""Chameleon (arXiv 2405.09818): one transformer for text and image codes, every weight shared, next-token loss on both (section 2).

What keeps it stable is configuration: `model.qk_norm: layer` for both sizes; the 7B has norms before the sublayers and dropout 0.1, the 34B norms
behind them (`model.norm_position: post`) and no dropout (section 2.3).
"""

from __future__ import annotations

from collections.abc import Sequence

from fusiontrain.config.schema import ModelConfig
from fusiontrain.models.recipes.recipe import Recipe, untie


def chameleon(model: ModelConfig, modalities: Sequence[str]) -> Recipe:
    return untie((), modalities)
