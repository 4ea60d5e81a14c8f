"""Weights in and out of Hugging Face: what a user of the library calls. Their classes are imported only where one is asked for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.llama_weights import export_llama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def from_llama(source: str | LlamaForCausalLM, recipe: str, **model_settings: Any) -> FusionModel:
    """A model of `recipe` that starts from a Llama folder or a `transformers.LlamaForCausalLM`.

    `model_settings` are further keys of the config's model section. Images are 32 x 32 pixels in 4 x 4 patches unless the model is
    built from a full configuration with `build_model`.
    """
    if not isinstance(source, str | Path):
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            return from_llama(folder, recipe, **model_settings)
    config = Config.model_validate(
        {
            "model": {"recipe": recipe, "base": str(source), **model_settings},
            "data": {
                "sources": [{"path": "unused"}],
                "modalities": ["text"] if recipe == "dense" else ["text", "image"],
                "image": {"size": 32, "patch_size": 4},
            },
            "train": {"steps": 1, "global_batch_sequences": 1},
        }
    )
    return build_model(config)


def to_llama(model: FusionModel) -> LlamaForCausalLM:
    """The text side as a `transformers.LlamaForCausalLM` in float32."""
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        export_llama(model, folder)
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
