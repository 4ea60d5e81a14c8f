"""The smallest configuration that is whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusiontrain.config.schema import Config


def tiny_config(overrides: Mapping[str, Any] | None = None) -> Config:
    """A Transfusion of two layers on bytes and 8 x 8 pixels in 4 x 4 patches. `overrides` maps dotted keys to values."""
    values: dict[str, Any] = {
        "model": {"recipe": "transfusion", "vocab_size": 260, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48},
        "data": {
            "sources": [{"path": "unused"}],
            "tokenizer": {"path": "bytes"},
            "image": {"size": 8, "patch_size": 4},
            "sequence_length": 96,
            "num_workers": 0,
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "train": {"steps": 4, "global_batch_sequences": 2},
        "sample": {"steps": 2},
    }
    for key, value in (overrides or {}).items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return Config.model_validate(values)
