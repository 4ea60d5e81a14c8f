"""Steps that would harm the weights: what counts as one, what is done, and that every rank and a resumed run decide alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusiontrain.config.schema import Config, TrainConfig
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.runs import Recorder, trainer_of
from fusiontrain.testing.training import full_tensors, world_config
from fusiontrain.train.bad_steps import Action, is_passed_over, judge, remember
from fusiontrain.train.metrics import read_metrics
from fusiontrain.train.step import StepResult
from fusiontrain.train.trainer import TrainingDiverged

STEPS = 24
QUIET = {"evaluate.every_steps": 999, "sample.prompts": (), "checkpoint.every_steps": 20, "train.steps": STEPS, "train.spike_window": 32}


def settings(**values: Any) -> TrainConfig:
    return TrainConfig(steps=1, global_batch_sequences=1, **values)


def result(loss: float, norm: float = 1.0) -> StepResult:
    return StepResult(loss, {}, norm)


@pytest.mark.parametrize(("policy", "action"), [("log", Action.UPDATE), ("skip", Action.SKIP), ("stop", Action.STOP)])
def test_a_spike_is_more_than_so_many_sigmas_above_the_last_steps(policy: str, action: Action) -> None:
    train = settings(spike=policy, spike_sigmas=3.0, spike_window=20)
    losses = np.random.default_rng(0).normal(2.0, 0.1, 50)
    history: dict[str, list[float]] = {}
    for place, loss in enumerate(losses):
        window = losses[max(0, place - 20) : place]
        limit = window.mean() + 3 * window.std() if len(window) >= 16 else math.inf
        for offered in (loss, limit * 1.0001, limit * 0.9999):
            if math.isfinite(offered):
                verdict = judge(result(float(offered)), history, train)
                assert (verdict.reason == "spike") == (offered > limit) and verdict.action is (action if offered > limit else Action.UPDATE)
        history = remember(history, result(float(loss)), train.spike_window)
    assert history["loss"] == losses[-20:].tolist()


def test_the_gradient_norm_is_watched_too_and_low_values_are_no_spike() -> None:
    history = {"loss": [1.0, 1.1] * 10, "grad_norm": [1.0, 1.1] * 10}
    assert judge(result(1.0, 5.0), history, settings(spike="skip")).action is Action.SKIP
    assert judge(result(-9.0, 0.0), history, settings(spike="skip")).action is Action.UPDATE


@pytest.mark.parametrize("bad", [result(math.nan), result(1.0, math.inf)])
def test_what_is_not_finite_is_never_used_and_never_remembered(bad: StepResult) -> None:
    history = {"loss": [1.0], "grad_norm": [2.0]}
    assert judge(bad, history, settings(spike="log")).action is Action.SKIP
    assert remember(history, bad, 16) == history


def test_ranges_of_steps_include_both_ends() -> None:
    assert [step for step in range(9) if is_passed_over(step, ((2, 3), (6, 6)))] == [2, 3, 6]


def train(config: Config, disturbed: int = 0) -> tuple[str, dict[str, Any], dict[str, torch.Tensor | None], list[str]]:
    """Run on the ranks of this process; the images of step `disturbed` are made a thousand times brighter. Returns how it ended, the final
    state, weights, and the events."""
    recorder = Recorder()
    with trainer_of(config, recorder) as trainer:
        iterate = trainer.loader.iterate

        def brighter(start: Any) -> Any:
            for batches, state in iterate(start):
                if state.step == disturbed:
                    for batch in batches:
                        batch.payloads["image"].values.mul_(1000)
                yield batches, state

        trainer.loader.iterate = brighter
        ended = ""
        try:
            trainer.run()
        except TrainingDiverged as error:
            ended = str(error)
        return ended, trainer.state.to_dict(), full_tensors(trainer.tensors["model"]), recorder.events


def run(config: Config, world_size: int, *args: int) -> Any:
    return shared_pool().run(train, world_size, config, *args)[0] if world_size > 1 else train(config, *args)


def lines(config: Config) -> list[dict[str, Any]]:
    path = Path(config.run.dir) / "bad_steps.jsonl"
    return read_metrics(path) if path.exists() else []


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_spike_is_skipped_and_its_documents_are_listed(tmp_path: Path, world_size: int) -> None:
    config = world_config(tmp_path, {**QUIET, "train.spike": "skip"})
    ended, state, _, events = run(config, world_size, 22)
    assert not ended and state["skipped_steps"] == 1 and state["skipped_in_a_row"] == 0
    (line,) = lines(config)
    assert (line["step"], line["reason"], line["action"]) == (22, "spike", "no update") and line["loss"] > 100
    assert {source["rank"] for source in line["sources"]} == set(range(world_size))
    assert all(set(source) == {"source", "shard", "index", "key", "rank"} for source in line["sources"])
    assert any(event.startswith("step 22: ") and "no update" in event for event in events)
    assert [row["skipped_steps"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")] == [0] * 21 + [1] * 3


def test_a_skipped_spike_leaves_the_weights_as_a_passed_over_step_does(tmp_path: Path) -> None:
    """Adam sees neither: the two runs end with the same weights, bit for bit."""
    skipped = run(world_config(tmp_path, {**QUIET, "train.spike": "skip", "run.dir": str(tmp_path / "a")}), 1, 22)
    config = world_config(tmp_path, {**QUIET, "train.skip_steps": ((22, 22),), "run.dir": str(tmp_path / "b")})
    passed = run(config, 1)
    assert skipped[2].keys() == passed[2].keys()
    assert all(torch.equal(skipped[2][name], passed[2][name]) for name in passed[2])
    assert passed[1]["skipped_steps"] == 0 and passed[1]["tokens"] != skipped[1]["tokens"]
    (line,) = lines(config)
    assert line["action"] == "passed over" and line["loss"] is None and line["sources"]
    row = read_metrics(Path(config.run.dir) / "metrics.jsonl")[21]
    assert row["loss"] is None and row["tokens"] == 0 and row["step"] == 22


def test_a_run_that_stops_for_a_spike_goes_on_when_told_to(tmp_path: Path) -> None:
    config = world_config(tmp_path, {**QUIET, "train.spike": "stop"})
    ended, *_ = run(config, 1, 22)
    assert "step 22: loss" in ended and "sigmas over its mean: stop" in ended
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == list(range(1, 22))
    again, *_ = run(config, 1, 22)
    assert again == ended, "the window of the last steps is part of the state: a resumed run sees the same spike"
    ended, state, *_ = run(world_config(tmp_path, {**QUIET, "train.spike": "stop", "train.skip_steps": ((22, 22),)}), 1, 22)
    assert not ended and state["step"] == STEPS
    assert [(line["step"], line["action"]) for line in lines(config)] == [(22, "passed over")]


def test_a_logged_spike_changes_nothing(tmp_path: Path) -> None:
    ended, state, _, events = run(world_config(tmp_path, QUIET), 1, 22)
    assert not ended and state["skipped_steps"] == 0 and any("sigmas over its mean: update" in event for event in events)
