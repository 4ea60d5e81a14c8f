"""LMFusion (arXiv 2412.15188): a frozen Llama and, beside it in every block, image modules that start as its copy.

Section 3.1: norms, QKV, O and FFN are per modality, the softmax over keys and values is shared. Section 5.1 names the ablations:
"deep" separates attention and FFN (the paper's model), "shallow" the FFN alone, "dense" nothing. What is not separated learns at the
text side's rate, so with the text frozen it is frozen too. The paper does not mention the final norm of image tokens: here it is
separate, and copied, wherever attention is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusiontrain.config.schema import ModelConfig
from fusiontrain.modality import TEXT
from fusiontrain.models.recipes.recipe import PARTS, SHARED, Part, Recipe, untie

SEPARATE: Mapping[str, tuple[Part, ...]] = {"deep": PARTS, "shallow": ("feed_forward_norm", "feed_forward"), "dense": ()}


def lmfusion(model: ModelConfig, modalities: Sequence[str]) -> Recipe:
    """Separate what `model.separation` says; freeze the text side unless `model.freeze_text` is off."""
    frozen = frozenset({TEXT.name, SHARED}) if model.freeze_text else frozenset()
    return untie(SEPARATE[model.separation], modalities, frozen_groups=frozen)
