"""Small training set-ups for tests: a base to start from, and one optimizer step's sequences in any split over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusiontrain.config.schema import Config
from fusiontrain.config.validate import has_frozen_prefix
from fusiontrain.data.collate import collate
from fusiontrain.data.world.make import make_world
from fusiontrain.models.build import build_model
from fusiontrain.models.llama_weights import export_llama
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
    settings = {"model.recipe": "lmfusion", "model.base": base, "model.image": {"patcher": "linear"}}
    return tiny_config({**no_shape, **settings, **(overrides or {})})


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
    return [collate(mine[first : first + size], config.data, has_frozen_prefix(config)) for first in range(0, share, size)]


def full_tensors(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Plain copies of tensors, gathered from all ranks where they are sharded. All ranks call this together."""
    return {
        name: None if tensor is None else (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def world_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """LMFusion on a small demo world: `folder/world` and `folder/base` are made where they are missing, the run goes to `folder/run`."""
    if not (folder / "world").is_dir():
        make_world(folder / "world", 40, seed=1)
        write_base(folder / "base")
    return lmfusion_config(
        str(folder / "base"),
        {
            "seed": 3,
            "run.dir": str(folder / "run"),
            "data.sources": [{"path": str(folder / "world" / "train")}],
            "data.validation_sources": [{"path": str(folder / "world" / "validation")}],
            "data.sequence_length": 256,
            "data.pack_window_documents": 16,
            "data.condition_dropout": 0.1,
            "objective.image": "flow_matching",
            "optimizer.warmup_steps": 2,
            "train.steps": 4,
            "train.global_batch_sequences": 4,
            "train.threads": 1,
            "checkpoint.every_steps": 2,
            "evaluate.every_steps": 2,
            "evaluate.batches": 1,
            "sample.prompts": ["a red circle."],
            "sample.every_steps": 4,
            **(overrides or {}),
        },
    )
