"""Whole runs of the recipes that MoT and Chameleon are: the loss falls, ranks change nothing, a resumed run goes on bit for bit, dropout included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.data.world.make import make_world
from fusiontrain.data.world.tokens import NUM_CODES, NUM_UNITS
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.runs import Recorder, trainer_of
from fusiontrain.testing.training import full_tensors
from fusiontrain.train.metrics import read_metrics

CODES = {"data.image": {"representation": "codes", "codebook_size": NUM_CODES}, "objective.image_weight": 1.0}
SPEECH = {
    "data.modalities": ["text", "image", "speech"], "data.speech.num_units": NUM_UNITS,
    "data.tokenizer.begin_speech_token": "<s>", "data.tokenizer.end_speech_token": "</s>",
}  # fmt: skip
RECIPES = {
    "MoT, patches": {"model.recipe": "mot", "model.norm_position": "post", "model.qk_norm": "rms", "model.image": {"patcher": "linear"}},
    "MoT, three modalities": {"model.recipe": "mot", "model.norm_position": "post", "model.vocab_size": 262 + NUM_CODES + NUM_UNITS, **CODES, **SPEECH},
    "Chameleon": {"model.recipe": "chameleon", "model.qk_norm": "layer", "model.dropout": 0.1, "model.vocab_size": 260 + NUM_CODES, **CODES},
}
STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder / "world", 30, seed=1, tokens=True)
    return folder


def config_of(world: Path, recipe: str, name: str, **overrides) -> Config:
    return tiny_config(
        {
            "seed": 3, "run.dir": str(world / name), "data.sources": [{"path": str(world / "world" / "train")}], "data.sequence_length": 320,
            "data.validation_sources": [{"path": str(world / "world" / "validation")}], "data.pack_window_documents": 16,
            "data.condition_dropout": 0.0, "data.image": {"size": 32, "patch_size": 8}, "objective.image": "flow_matching",
            "optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 2, "train.steps": STEPS, "train.threads": 1, "checkpoint.every_steps": STEPS // 2,
            "evaluate.every_steps": None, "sample.every_steps": None, **RECIPES[recipe], **overrides,
        }
    )  # fmt: skip


def train(config: Config) -> dict[str, torch.Tensor | None]:
    with trainer_of(config, Recorder()) as trainer:
        assert trainer.run()
        return full_tensors({f"{group}/{name}": tensor for group, part in trainer.tensors.items() for name, tensor in part.items()})


def losses(config: Config) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns_and_ends_the_same_resumed_and_on_two_ranks(world, recipe):
    whole = config_of(world, recipe, f"{recipe}/whole")
    expected, found = train(whole), losses(whole)
    assert len(found) == STEPS
    for name in whole.data.modalities:
        of_modality = [row[f"loss/{name}"] for row in read_metrics(Path(whole.run.dir) / "metrics.jsonl") if row[f"loss/{name}"] is not None]
        assert of_modality[-1] < 0.98 * of_modality[0], (name, of_modality)

    half = Path(whole.run.dir) / "checkpoints" / f"step-{STEPS // 2:08d}"
    resumed = train(config_of(world, recipe, f"{recipe}/resumed", **{"checkpoint.resume": str(half)}))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items() if tensor is not None), "bit for bit"

    spread = config_of(world, recipe, f"{recipe}/spread")
    shared_pool().run(train, 2, spread, timeout_seconds=300)
    assert losses(spread) == pytest.approx(found, rel=1e-4), "two ranks see what one sees"
