"""What every recipe is able to do, one test for each pair: `make recipes` makes the README's table of their results.

A recipe is trained once, on two ranks by the real engine, and the tests of that recipe use the run.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import fusiontrain
from fusiontrain.cli.main import main
from fusiontrain.config.schema import Config
from fusiontrain.config.validate import uses_images
from fusiontrain.data.world.tokens import NUM_CODES, NUM_UNITS
from fusiontrain.models.build import build_model
from fusiontrain.models.flops import ATTENTION, count_flops
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.recipes import PATCH, RECIPES, SIDE, full_sequence, make_recipe_world, recipe_config
from fusiontrain.testing.runs import Recorder, trainer_of
from fusiontrain.testing.training import full_tensors
from fusiontrain.train.metrics import read_metrics

STEPS = 8
PRODUCTS = ("mm", "addmm", "convolution", "convolution_backward")
each_recipe = pytest.mark.parametrize("recipe", RECIPES, scope="module")


@dataclass(frozen=True)
class Run:
    """A finished run: what it stored, and the logits and losses of its model on one sequence before the ranks parted."""

    config: Config
    tensors: dict[str, torch.Tensor]
    logits: torch.Tensor
    losses: dict[str, float]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [row for row in read_metrics(Path(self.config.run.dir) / "metrics.jsonl") if "loss" in row]

    @property
    def half(self) -> str:
        return str(Path(self.config.run.dir) / "checkpoints" / f"step-{STEPS // 2:08d}")


def train(config: Config) -> Run:
    """Train on the ranks of this process, or alone."""
    with trainer_of(config, Recorder()) as trainer:
        assert trainer.run()
        tensors = {f"{group}/{name}": tensor for group, part in trainer.tensors.items() for name, tensor in part.items()}
        model, batch = trainer.model.eval(), full_sequence(config)
        with torch.no_grad():
            losses = {name: float(term.sum) for name, term in model(batch).items()}
            return Run(config, full_tensors(tensors), model.text_logits(batch), losses)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_recipe_world(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def trained(world: Path, recipe: str) -> Run:
    """The recipe's run on two ranks."""
    return shared_pool().run(train, 2, recipe_config(world, recipe, f"{recipe}/whole", STEPS), timeout_seconds=300)[0]


@each_recipe
def test_trains(recipe: str, trained: Run) -> None:
    """Every loss falls, every weight that trains moves, and no other."""
    assert len(trained.metrics) == STEPS
    for name in trained.config.data.modalities:
        found = [row[f"loss/{name}"] for row in trained.metrics if row[f"loss/{name}"] is not None]
        assert found and all(map(math.isfinite, found)), name
        learns = not (name == "text" and recipe == "LMFusion")  # what is frozen knows what it knew
        few = min(3, len(found) // 2)  # not every step of so small a world has speech
        assert not learns or np.mean(found[-few:]) < 0.98 * np.mean(found[:few]), (name, found)
    start = build_model(trained.config)
    for name, parameter in start.named_parameters():
        moved = f"model/{name}" in trained.tensors and not torch.equal(parameter, trained.tensors[f"model/{name}"])
        assert moved == parameter.requires_grad, name
    frozen = [name for name, parameter in start.named_parameters() if not parameter.requires_grad]
    assert bool(frozen) == (recipe == "LMFusion")


@each_recipe
def test_resumes(recipe: str, trained: Run, world: Path) -> None:
    """From the middle: on as many ranks bit for bit, on fewer with the losses of the undisturbed run."""
    same = recipe_config(world, recipe, f"{recipe}/same", STEPS, {"checkpoint.resume": trained.half})
    resumed = shared_pool().run(train, 2, same, timeout_seconds=300)[0]
    assert trained.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in trained.tensors.items()), "bit for bit"
    alone = train(recipe_config(world, recipe, f"{recipe}/alone", STEPS, {"checkpoint.resume": trained.half}))
    rest = trained.metrics[STEPS // 2 :]
    assert [row["step"] for row in alone.metrics] == [row["step"] for row in rest]
    assert [row["loss"] for row in alone.metrics] == pytest.approx([row["loss"] for row in rest], rel=1e-4)
    assert [row["flops"] for row in alone.metrics] == [row["flops"] for row in rest]


@each_recipe
def test_samples(recipe: str, trained: Run, tmp_path: Path, capsys) -> None:
    """A picture from text and text from a picture; of codes exactly as many as a picture has; units of speech; text from a model of text."""

    def sampled(*arguments: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["sample", trained.config.run.dir, *arguments, "--out", str(tmp_path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["samples"]

    brief = ("--max-new-tokens", "8")
    if uses_images(trained.config):
        (sample,) = sampled("--prompt", "a red circle.", "--guidance", "1", "--steps", "2")
        picture = np.asarray(Image.open(tmp_path / sample["file"]))
        assert picture.shape == (SIDE, SIDE, 3) and picture.std() > 0
        (caption,) = sampled("--image", str(tmp_path / sample["file"]), *brief)
        assert isinstance(caption["text"], str)
    elif "image" in trained.config.data.modalities:
        (sample,) = sampled("--prompt", "a red circle.", "--temperature", "1")
        assert len(sample["codes"]) == (SIDE // PATCH) ** 2 and all(0 <= code < NUM_CODES for code in sample["codes"]) and len(set(sample["codes"])) > 1
        (document,) = sampled("--prompt", "a red circle.", "--mode", "interleave", *brief)
        assert all(isinstance(piece.get("text"), str) or len(piece["codes"]) == (SIDE // PATCH) ** 2 for piece in document["pieces"])
        if "speech" in trained.config.data.modalities:
            (sample,) = sampled("--prompt", "a red circle.", "--mode", "speak", "--temperature", "1", *brief)
            assert sample["units"] and all(0 <= unit < NUM_UNITS for unit in sample["units"])
    else:
        (sample,) = sampled("--prompt", "a red", "--temperature", "1", *brief)
        assert sample["prompt"] == "a red" and isinstance(sample["text"], str)


@each_recipe
def test_exports(recipe: str, trained: Run, tmp_path: Path, capsys) -> None:
    """What is loaded from the exported folder computes what the engine's own model did."""
    out = tmp_path / "model"
    assert main(["checkpoint", "export", trained.config.run.dir, "--out", str(out)]) == 0
    loaded, batch = fusiontrain.load(out), full_sequence(trained.config)
    assert loaded.config.model.recipe == trained.config.model.recipe
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.text_logits(batch), trained.logits, rtol=1e-6, atol=1e-6)
        found = {name: float(term.sum) for name, term in loaded.model(batch).items()}
    assert found == pytest.approx(trained.losses, rel=1e-6)


@each_recipe
def test_flops_are_exact(recipe: str, world: Path) -> None:
    """Products against torch's own counter, over a sequence without padding. It bills attention for every pair: those that the mask allows are
    counted one by one."""
    config = recipe_config(world, recipe, "none", STEPS, {"kernels.impl": "reference"})
    model, batch = build_model(config), full_sequence(config)
    with FlopCounterMode(display=False) as counter:
        sum(term.sum for term in model(batch).values()).backward()
    by_name = {str(op).split(".")[-1]: flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert by_name.keys() <= {*PRODUCTS, "bmm"}, by_name
    counted = count_flops(model, batch)
    assert sum(flops for name, flops in counted.items() if name != ATTENTION) == sum(by_name.get(name, 0) for name in PRODUCTS)
    assert counted[ATTENTION] == attention_by_pairs(model, batch)


def attention_by_pairs(model: Any, batch: Any) -> int:
    """Two products for every pair forward; backward two for a query that has one, and two for a key of those."""
    order, segments = batch.order_ids, batch.segment_ids
    assert (batch.doc_ids == 0).all(), "one document"
    allowed = (order[None, :] <= order[:, None]) | ((segments[:, None] == segments[None, :]) & (segments[:, None] >= 0))
    prefix = batch.num_prefix_rows
    assert (prefix > 0) == model.recipe.freezes_text
    products = 2 * allowed.sum() + 2 * allowed[prefix:].sum() + 2 * allowed[prefix:, prefix:].sum()
    return 2 * int(products) * model.shape.num_heads * model.shape.head_dim * model.shape.num_layers
