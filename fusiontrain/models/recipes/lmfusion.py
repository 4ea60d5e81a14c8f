"""LMFusion (arXiv 2412.15188): a frozen Llama and, beside it in every block, image modules that start as its copy.

Section 3.1: norms, QKV, O and FFN are per modality, the softmax over keys and values is shared. Section 5.1 names the ablations:
"deep" separates attention and FFN (the paper's model), "shallow" the FFN alone, "dense" nothing. What is not separated learns at the
text side's rate, so with the text frozen it is frozen too. The paper does not mention the final norm of image tokens: here it is
separate, and copied, wherever attention is.
"""

from __future__ import annotations

from fusiontrain.config.schema import ModelConfig
from fusiontrain.modality import TEXT
from fusiontrain.models.recipes.recipe import ONE_EACH, ONE_FOR_ALL, SHARED, Recipe


def lmfusion(model: ModelConfig) -> Recipe:
    """Separate what `model.separation` says; freeze the text side unless `model.freeze_text` is off."""
    attention = ONE_EACH if model.separation == "deep" else ONE_FOR_ALL
    feed_forward = ONE_FOR_ALL if model.separation == "dense" else ONE_EACH
    frozen = frozenset({TEXT.name, SHARED}) if model.freeze_text else frozenset()
    return Recipe(attention=attention, feed_forward=feed_forward, final_norm=attention, frozen_groups=frozen)
