"""The moving average of the weights: its values against a loop over the weights of every step, resume bit for bit, and its use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fusiontrain.cli.main import main
from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.runs import trainer_of
from fusiontrain.testing.training import full_tensors, world_config
from fusiontrain.train.inference import load_for_inference
from fusiontrain.utils.errors import UserError

DECAY, STEPS = 0.6, 4
Named = dict[str, torch.Tensor]


def train(config: Config) -> dict[str, Named]:
    """What a run ends with: whole tensors by group."""
    with trainer_of(config) as trainer:
        trainer.run()
        return {group: full_tensors(part) for group, part in trainer.tensors.items()}


def averaging(folder: Path, name: str, decay: float | None = DECAY) -> Config:
    every_step = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 9, "evaluate.every_steps": 99, "sample.prompts": ()}
    return world_config(folder, {"run.dir": str(folder / name), "train.steps": STEPS, "train.ema_decay": decay, **every_step})


def weights_of(path: Path, averaged: bool = False) -> Named:
    return {name: parameter.detach() for name, parameter in load_for_inference(path, averaged).model.named_parameters()}


def checkpoint(config: Config, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Config, dict[str, Named]]:
    config = averaging(folder, "whole")
    return config, shared_pool().run(train, 2, config)[0]


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Config, dict[str, Named]]:
    config = averaging(folder, "plain", None)
    return config, train(config)


def test_it_is_the_loop_over_all_steps_and_changes_nothing_else(whole, plain) -> None:
    config, tensors = whole
    model = build_model(config)
    frozen = set(model.plan().frozen)
    average = {name: parameter.detach().double() for name, parameter in model.named_parameters() if name not in frozen}
    for step in range(1, STEPS + 1):
        now = weights_of(checkpoint(config, step))
        average = {name: DECAY * value + (1 - DECAY) * now[name].double() for name, value in average.items()}
        stored = weights_of(checkpoint(config, step), averaged=True)
        for name, value in average.items():
            torch.testing.assert_close(stored[name].double(), value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert all(torch.equal(stored[name], now[name]) for name in frozen), "frozen weights are their own average"
    assert tensors["ema"].keys() == average.keys()
    assert any((tensors["ema"][name] - tensors["model"][name]).abs().max() > 1e-4 for name in average)
    for name, value in plain[1]["model"].items():
        torch.testing.assert_close(tensors["model"][name], value, atol=5e-4, rtol=1e-3)


def test_a_resumed_run_averages_bit_for_bit(folder: Path, whole) -> None:
    config = averaging(folder, "resumed")
    shutil.copytree(whole[0].run.dir, config.run.dir)
    for step in range(3, STEPS + 1):
        shutil.rmtree(checkpoint(config, step))
    resumed = shared_pool().run(train, 2, config)[0]
    for group, part in whole[1].items():
        assert all(torch.equal(resumed[group][name], value) for name, value in part.items()), group


def test_a_text_that_learns_at_its_own_rate_resumes_bit_for_bit(folder: Path) -> None:
    """Rates are of the config, moments and averages of the checkpoint."""
    slow = {"model.freeze_text": False, "optimizer.text_learning_rate_ratio": 0.01, "checkpoint.every_steps": 2, "sample.prompts": ()}
    config, again = (world_config(folder, {"run.dir": str(folder / name), "train.ema_decay": DECAY, **slow}) for name in ("slow", "slow-again"))
    tensors = train(config)
    shutil.copytree(config.run.dir, again.run.dir)
    shutil.rmtree(checkpoint(again, STEPS))
    for group, part in train(again).items():
        assert all(torch.equal(tensors[group][name], value) for name, value in part.items()), group
    first = dict(build_model(config).named_parameters())
    moved = {name: float((value - first[name]).abs().mean()) for name, value in tensors["model"].items() if name in first}
    text, image = (moved[f"blocks.1.feed_forward.up.{side}.weight"] for side in ("text", "image"))
    assert 0 < text < 0.05 * image


def test_a_run_that_begins_to_average_starts_from_its_weights(folder: Path, plain) -> None:
    config = averaging(folder, "late")
    shutil.copytree(plain[0].run.dir, config.run.dir)
    shutil.rmtree(checkpoint(config, STEPS))
    tensors = train(config)
    before = weights_of(checkpoint(config, STEPS - 1))
    for name, average in tensors["ema"].items():
        wanted = DECAY * before[name] + (1 - DECAY) * tensors["model"][name]
        torch.testing.assert_close(average, wanted, atol=1e-6, rtol=1e-5)


def test_a_run_that_stops_averaging_goes_on(folder: Path, whole) -> None:
    config = averaging(folder, "dropped", None)
    shutil.copytree(whole[0].run.dir, config.run.dir)
    shutil.rmtree(checkpoint(config, STEPS))
    tensors = train(config)
    assert "ema" not in tensors
    with pytest.raises(UserError, match="holds no averages"):
        load_for_inference(checkpoint(config, STEPS), averaged=True)


def test_commands_use_it_when_asked(whole, plain, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def losses(*arguments: str) -> dict:
        capsys.readouterr()
        assert main(["evaluate", whole[0].run.dir, "--judge", "0", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["validation"]

    assert losses("--ema") != losses()
    sample = ["sample", "--prompt", "a red circle", "--steps", "2", "--out", str(tmp_path), "--ema"]
    assert main([*sample, whole[0].run.dir]) == 0
    assert main([*sample, plain[0].run.dir]) == 2
    assert "train.ema_decay was null" in capsys.readouterr().err
