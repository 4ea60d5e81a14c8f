"""Small training set-ups for tests: a base to start from, and one optimizer step's sequences in any split over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusiontrain.config.schema import Config
from fusiontrain.data.collate import collate
from fusiontrain.models.build import build_model
from fusiontrain.models.hf import export_llama
from fusiontrain.testing.batches import random_documents
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import document
from fusiontrain.types import Batch, Document, PackedSequence

SHAPE_KEYS = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
BOI, EOI = 258, 259


def write_base(folder: Path, seed: int = 5) -> str:
    """A random dense model of `tiny_config`'s shape as a Llama folder; returns its path."""
    config = tiny_config({"seed": seed, "model.recipe": "dense", "data.modalities": ["text"]})
    export_llama(build_model(config), str(folder))
    return str(folder)


def lmfusion_config(base: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """`tiny_config` as LMFusion on top of a folder made by `write_base`."""
    no_shape = {f"model.{key}": None for key in SHAPE_KEYS}
    return tiny_config({**no_shape, "model.recipe": "lmfusion", "model.base": base, "model.image": {"patcher": "linear"}, **(overrides or {})})


def make_sequences(kinds: Sequence[str], config: Config, step: int = 0) -> list[PackedSequence]:
    """One packed sequence per entry: `mixed` documents, `text` alone, an `image` that no labelled text surrounds, or `empty` (padding)."""
    return [
        PackedSequence(tuple(_documents(kind, 100 * step + place)), config.data.sequence_length, 1000 * step + place)
        for place, kind in enumerate(kinds)
    ]


def _documents(kind: str, seed: int) -> list[Document]:
    if kind == "empty":
        return []
    if kind == "text":
        return [document([256, 72, 101, 40 + seed % 50, 257], seed=seed)]
    if kind == "image":  # [BOI] patches: one text token, which no text token follows, so nothing is labelled
        return [document([BOI], ("image", 2, 2), seed=seed)]
    return [document([256, 9, 8, BOI], ("image", 2, 2), [EOI, 33, 34 + seed % 9, 257], seed=seed), *random_documents(seed, 1)]


def split(sequences: Sequence[PackedSequence], config: Config, rank: int, world_size: int, micro_batches: int) -> list[Batch]:
    """A rank's share of one step's sequences, in `micro_batches` micro-batches of equal size."""
    share = len(sequences) // world_size
    mine = sequences[rank * share : (rank + 1) * share]
    size = share // micro_batches
    return [collate(mine[first : first + size], config.data) for first in range(0, share, size)]


def full_tensors(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Plain copies of tensors, gathered from all ranks where they are sharded. All ranks call this together."""
    return {
        name: None if tensor is None else (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
        for name, tensor in tensors.items()
    }
