"""Mixture-of-Transformers (arXiv 2411.04996): all weights but embeddings and heads per modality, one attention over all tokens (section 2.2).

`model.untied` names the parts for the ablation of section 3.5, `model.merged` the modalities that share theirs for its leave-one-out. The paper
norms behind each sublayer (`model.norm_position: post`). It does not say which modality the tokens around an image belong to: here they are text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusiontrain.config.schema import ModelConfig
from fusiontrain.models.recipes.recipe import Part, Recipe, untie

PARTS_OF: Mapping[str, tuple[Part, ...]] = {
    "ffn": ("feed_forward",),
    "qkv": ("qkv",),
    "o": ("o",),
    "norms": ("attention_norm", "qk_norm", "feed_forward_norm", "final_norm"),
}
"""The names of `model.untied`."""


def mot(model: ModelConfig, modalities: Sequence[str]) -> Recipe:
    return untie([part for name in model.untied for part in PARTS_OF[name]], modalities, model.merged)
