"""Every recipe, tiny, on the demo world: the rows of the README's table of recipes, whose columns are what each must be able to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusiontrain.config.schema import Config
from fusiontrain.config.validate import uses_images
from fusiontrain.data.world.make import make_world
from fusiontrain.data.world.tokens import NUM_CODES, NUM_UNITS
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import Part, batch_of, document
from fusiontrain.testing.models import BYTES_VOCAB
from fusiontrain.testing.training import SHAPE_KEYS, write_base
from fusiontrain.types import Batch

BOS, EOS, BOI, EOI, BEGIN_SPEECH, END_SPEECH = range(256, 262)
NUM_MARKERS_OF_SPEECH = 2
LENGTH, SIDE, PATCH = 320, 32, 8

_CODES = {"data.image": {"size": SIDE, "patch_size": PATCH, "representation": "codes", "codebook_size": NUM_CODES}, "objective.image_weight": 1.0}
_SPEECH = {
    "data.modalities": ["text", "image", "speech"], "data.speech.num_units": NUM_UNITS,
    "data.tokenizer.begin_speech_token": "<s>", "data.tokenizer.end_speech_token": "</s>",
}  # fmt: skip
_MOT = {"model.recipe": "mot", "model.norm_position": "post", "model.qk_norm": "rms", "model.image": {"patcher": "linear"}}

RECIPES: dict[str, dict[str, Any]] = {
    "LMFusion": {"model.recipe": "lmfusion", "model.image": {"patcher": "linear"}, **dict.fromkeys(f"model.{key}" for key in SHAPE_KEYS)},
    "Transfusion": {"model.recipe": "transfusion", "model.image": {"patcher": "unet", "unet_channels": 8}, "objective.image": "ddpm"},
    "MoT, Transfusion setting": _MOT,
    "MoT, Chameleon setting": {**_MOT, **_CODES, "model.vocab_size": BYTES_VOCAB + NUM_CODES},
    "MoT, three modalities": {**_MOT, **_CODES, **_SPEECH, "model.vocab_size": BYTES_VOCAB + NUM_MARKERS_OF_SPEECH + NUM_CODES + NUM_UNITS},
    "Chameleon": {
        "model.recipe": "chameleon", "model.qk_norm": "layer", "model.dropout": 0.1, "objective.z_loss": 1e-5, **_CODES,
        "model.vocab_size": BYTES_VOCAB + NUM_CODES,
    },
    "Dense Llama": {"model.recipe": "dense", "data.modalities": ["text"]},
}  # fmt: skip

CAPABILITIES = {
    "trains": "trains on 2 ranks",
    "resumes": "resumes on 2, and on 1",
    "samples": "samples",
    "exports": "exports",
    "flops_are_exact": "FLOPs exact",
}
"""The end of the name of a test -> the heading of its column."""


def make_recipe_world(folder: Path) -> Path:
    """A demo world with codes and units beside its pictures and texts, and a Llama for LMFusion; returns `folder`."""
    make_world(folder / "world", 30, seed=1, tokens=True)
    write_base(folder / "base")
    return folder


def recipe_config(folder: Path, recipe: str, run: str, steps: int, overrides: Mapping[str, Any] | None = None) -> Config:
    """A run of `steps` in `folder/run`, which saves in the middle and at the end, on what `make_recipe_world` made there."""
    base = {"model.base": str(folder / "base")} if recipe == "LMFusion" else {}
    return tiny_config(
        {
            "seed": 3, "run.dir": str(folder / run), "data.sources": [{"path": str(folder / "world" / "train")}],
            "data.validation_sources": [{"path": str(folder / "world" / "validation")}], "data.sequence_length": LENGTH,
            "data.pack_window_documents": 16, "data.condition_dropout": 0.0, "data.image": {"size": SIDE, "patch_size": PATCH},
            "objective.image": "flow_matching", "optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 2, "train.steps": steps, "train.threads": 1,
            "train.global_batch_sequences": 4, "checkpoint.every_steps": steps // 2, "evaluate.every_steps": None, "sample.every_steps": None,
            **RECIPES[recipe], **base, **(overrides or {}),
        }
    )  # fmt: skip


def full_sequence(config: Config) -> Batch:
    """One sequence without padding, with a part of every modality of a recipe's config between parts of text."""
    modalities, random = config.data.modalities, np.random.default_rng(7)
    vocab_of_text = BYTES_VOCAB + NUM_MARKERS_OF_SPEECH * ("speech" in modalities)
    parts: list[Part] = [[BOS, *b"a red circle."]]
    if "image" in modalities:
        codes: Part = _ids("codes", vocab_of_text + random.integers(0, NUM_CODES, (SIDE // PATCH) ** 2))
        parts += [[BOI], ("image", SIDE // PATCH, SIDE // PATCH) if uses_images(config) else codes, [EOI, *b"and"]]
    if "speech" in modalities:
        parts += [[BEGIN_SPEECH], _ids("speech", vocab_of_text + NUM_CODES + random.integers(0, NUM_UNITS, 9)), [END_SPEECH]]
    used = sum(segment.num_tokens for segment in document(*parts).segments)
    parts.append(random.integers(97, 123, LENGTH - used).tolist())
    return batch_of([document(*parts, patch_dim=3 * PATCH * PATCH)], config)


def _ids(kind: str, ids: np.ndarray) -> tuple[str | int, ...]:
    """The part of a document that these tokens are."""
    numbers: list[int] = ids.tolist()
    return (kind, *numbers)
