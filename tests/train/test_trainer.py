"""Whole runs on a small demo world: resume bit for bit on any number of ranks, a polite stop, and what the run folder holds."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.testing.ranks import RankFailure, shared_pool
from fusiontrain.testing.runs import Recorder, trainer_of
from fusiontrain.testing.training import full_tensors, world_config, write_base
from fusiontrain.train.build import check_config
from fusiontrain.train.checkpoint import list_checkpoints, read_manifest
from fusiontrain.train.inference import load_for_inference
from fusiontrain.train.metrics import read_metrics
from fusiontrain.train.signals import stop_on_signals
from fusiontrain.train.trainer import TrainingDiverged
from fusiontrain.utils.errors import UserError

REQUIRED = {
    "step", "loss", "loss/text", "loss/image", "grad_norm", "lr", "tokens", "tokens/text", "tokens/image", "tokens_per_second",
    "step_seconds", "data_seconds", "save_seconds", "flops", "mfu", "memory_gib", "skipped",
}  # fmt: skip
TIMES = {"tokens_per_second", "step_seconds", "data_seconds", "save_seconds", "memory_gib", "imbalance/compute_seconds"}


def train(config: Config, signal_at: int = 0, signal_rank: int = 0) -> tuple[bool, dict[str, torch.Tensor | None], list[str]]:
    """Run `config` on the ranks of this process; send one of them SIGTERM after a step. Returns (finished, stored tensors, events)."""

    def nothing_gathered() -> bool:
        return trainer.ranks.world_size == 1 or all(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())

    def act(values: Mapping[str, Any]) -> None:
        assert nothing_gathered(), "an evaluation left weights gathered"
        if values["step"] == signal_at and trainer.ranks.rank == signal_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    recorder = Recorder(act)
    with stop_on_signals() as stop, trainer_of(config, recorder, stop) as trainer:
        finished = trainer.run()
        assert nothing_gathered(), "painting left weights gathered"
        tensors = {f"{group}/{name}": tensor for group, part in trainer.tensors.items() for name, tensor in part.items()}
        return finished, full_tensors(tensors), recorder.events


def run(config: Config, world_size: int, *args: int) -> tuple[bool, dict[str, torch.Tensor | None], list[str]]:
    return shared_pool().run(train, world_size, config, *args)[0] if world_size > 1 else train(config, *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[int, tuple[Config, dict[str, torch.Tensor | None]]]:
    """Uninterrupted runs on one and on two ranks."""
    runs = {}
    for world_size in (1, 2):
        config = world_config(folder, {"run.dir": str(folder / f"whole-{world_size}")})
        finished, tensors, _ = run(config, world_size)
        assert finished
        runs[world_size] = (config, tensors)
    return runs


def metrics(config: Config) -> list[dict[str, Any]]:
    return read_metrics(Path(config.run.dir) / "metrics.jsonl")


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def interrupted(folder: Path, name: str, whole_run: Config) -> Config:
    """A copy of a whole run as a kill after step 3 would have left it: checkpoint of step 2, metrics of step 3 half written."""
    target = folder / name
    shutil.copytree(whole_run.run.dir, target)
    shutil.rmtree(target / "checkpoints" / "step-00000004")
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    return world_config(folder, {"run.dir": str(target)})


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_continues_bit_for_bit(folder: Path, whole, world_size: int) -> None:
    wanted_config, wanted = whole[world_size]
    config = interrupted(folder, f"resumed-{world_size}", wanted_config)
    _, tensors, events = run(config, world_size)
    assert events[0] == "from 2 to 4"
    assert without_times(metrics(config)) == without_times(metrics(wanted_config))
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def damage(checkpoint: Path) -> None:
    path = sorted(checkpoint.glob("*.distcp"))[-1]  # the last rank's: only that rank can find it
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_checkpoint_is_passed_over_by_name(folder: Path, whole, world_size: int) -> None:
    wanted_config, wanted = whole[world_size]
    target = folder / f"damaged-{world_size}"
    shutil.copytree(wanted_config.run.dir, target)
    config = world_config(folder, {"run.dir": str(target)})
    damage(target / "checkpoints" / "step-00000004")
    _, tensors, events = run(config, world_size)
    newest, used = (target / "checkpoints" / f"step-0000000{step}" for step in (4, 2))
    file = f"__{world_size - 1}_0.distcp"
    assert events[0] == f"passed over {newest}, which is damaged ({file}: does not match its checksum): resumed from {used} instead"
    assert events[1].startswith(f"resumed from {used}: what {target} held (1 checkpoint, lines of metrics, samples) is set aside")
    assert events[2] == "from 2 to 4"
    assert without_times(metrics(config)) == without_times(metrics(wanted_config))
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)

    for checkpoint in (target / "checkpoints").glob("step-0000000?"):
        damage(checkpoint)
    with pytest.raises((UserError, RankFailure), match="no older checkpoint is sound either"):
        run(config, world_size)


def test_a_run_continues_on_another_number_of_ranks(folder: Path, whole) -> None:
    wanted_config, wanted = whole[2]
    config = interrupted(folder, "two-to-one", wanted_config)
    _, tensors, _ = run(config, 1)
    for got, line in zip(metrics(config), metrics(wanted_config), strict=True):
        assert got["loss"] == pytest.approx(line["loss"], rel=1e-5) and got["tokens"] == line["tokens"] and got["flops"] == line["flops"]
    assert without_times(metrics(config)[:2]) == without_times(metrics(wanted_config)[:2])
    for name, value in wanted.items():
        torch.testing.assert_close(tensors[name], value, atol=5e-4, rtol=1e-3)


def test_a_stop_on_one_rank_saves_and_ends_all_and_the_rest_follows_later(folder: Path, whole) -> None:
    _, wanted = whole[2]
    config = world_config(folder, {"run.dir": str(folder / "stopped"), "checkpoint.every_steps": 100, "evaluate.every_steps": 1, "sample.every_steps": 3})
    finished, _, _ = run(config, 2, 2, 1)
    assert not finished
    # The signal comes at the end of step 2 on rank 1, so all ranks agree on it in step 3.
    assert [path.name for path in list_checkpoints(Path(config.run.dir) / "checkpoints")] == ["step-00000003"]
    assert ["validation/text" in line for line in metrics(config)] == [True, True, False], "a stop waits for no evaluation"
    assert not list((Path(config.run.dir) / "samples").glob("*00000003*")), "and for no painting"
    finished, tensors, _ = run(config, 2)
    assert finished and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_the_run_folder(whole) -> None:
    config, _ = whole[2]
    folder, lines = Path(config.run.dir), metrics(config)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(set(line) >= REQUIRED for line in lines)
    assert all(line["tokens"] == line["tokens/text"] + line["tokens/image"] > 0 and line["flops"] > 0 for line in lines)
    assert all(line["mfu"] is None and 0 < line["data_seconds"] < line["step_seconds"] and line["skipped"] == 0 for line in lines)
    assert all(line[f"skipped/{reason}"] == 0 for line in lines for reason in ("format", "decode", "checksum", "read", "changed"))
    assert all(line["tokens_per_second"] == pytest.approx(line["tokens"] / line["step_seconds"]) for line in lines)
    assert [line["lr"] for line in lines][:2] == [0.0005, 0.001]
    assert [line["step"] for line in lines if "validation/text" in line and "validation/image" in line] == [2, 4]
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.jsonl", "bad_samples.jsonl", "tensorboard", "checkpoints", "samples"}
    assert (folder / "samples/step-00000004/grid.png").is_file()
    assert json.loads((folder / "samples/step-00000004/prompts.json").read_text()) == ["a red circle."]
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_one_and_two_ranks_tell_the_same(whole) -> None:
    for one, two in zip(metrics(whole[1][0]), metrics(whole[2][0]), strict=True):
        for key in ("loss", "loss/text", "loss/image", "grad_norm", "validation/text", "validation/image"):
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), rel=1e-4), key
        assert all(one[key] == two[key] for key in ("tokens", "tokens/image", "targets/text", "flops"))


def test_a_checkpoint_names_frozen_weights_and_is_enough_to_sample_from(folder: Path, whole) -> None:
    config, wanted = whole[2]
    path = list_checkpoints(Path(config.run.dir) / "checkpoints")[-1]
    trained = load_for_inference(path)
    model, loaded, tokenizer = trained.model, trained.config, trained.tokenizer
    frozen = set(model.plan().frozen)
    stored = set(read_manifest(path)["model"]["tensors"])
    assert frozen and not frozen & stored and frozen | stored >= {name for name, _ in model.named_parameters()}
    assert loaded == config and tokenizer.begin_image_id
    fresh = dict(build_model(config).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh[name] if name in frozen else wanted[f"model/{name}"]), name


def test_the_base_must_be_there_and_be_the_same(folder: Path, whole) -> None:
    checkpoint = list_checkpoints(Path(whole[1][0].run.dir) / "checkpoints")[-1]
    hidden = folder / "hidden"
    (folder / "base").rename(hidden)
    try:
        with pytest.raises(UserError, match=r"model\.base=.*base is not there"):
            load_for_inference(checkpoint)
        write_base(folder / "base", seed=99)
        with pytest.raises(UserError, match=r"its base was .*base.* has other weights"):
            load_for_inference(checkpoint)
    finally:
        shutil.rmtree(folder / "base", ignore_errors=True)
        hidden.rename(folder / "base")
    load_for_inference(checkpoint)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"model.image": {"patcher": "linear", "position_embedding": "sincos2d"}}, "model.image.position_embedding is 'none' there"),
        ({"model.separation": "shallow"}, "another model: model.separation is 'deep' there and 'shallow' here"),
        ({"seed": 4}, "other data.* seed differs"),
        ({"train.global_batch_sequences": 8}, "train.global_batch_sequences differs"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder: Path, whole, overrides: dict[str, Any], word: str) -> None:
    checkpoint = list_checkpoints(Path(whole[1][0].run.dir) / "checkpoints")[-1]
    config = world_config(folder, {"run.dir": str(folder / "refused"), "checkpoint.resume": str(checkpoint), **overrides})
    with pytest.raises(UserError, match=word), trainer_of(config):
        pass


def test_a_run_that_diverges_stops_with_a_sentence_and_keeps_its_weights(folder: Path) -> None:
    never = {"evaluate.every_steps": 99, "checkpoint.every_steps": 99, "sample.prompts": ()}
    config = world_config(folder, {"run.dir": str(folder / "diverged"), "train.steps": 20, **never})
    recorder = Recorder()
    with trainer_of(config, recorder) as trainer:
        with torch.no_grad():
            trainer.model.image.input.weight[0, 0] = math.nan
        before = {name: tensor.clone() for name, tensor in trainer.tensors["model"].items()}
        with pytest.raises(TrainingDiverged, match="step 5: 5 steps in a row made no update"):
            trainer.run()
    assert [line["loss"] for line in metrics(config)] == [None] * 5
    assert metrics(config)[-1]["skipped_steps"] == 5
    assert sum("no update" in event for event in recorder.events) == 5
    for name, tensor in trainer.tensors["model"].items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def break_a_weight_after_step_3(config: Config) -> list[str]:
    """Train; the last rank's part of a weight becomes infinite after step 3. What the run said when it stopped, and its checkpoints."""

    def act(values: Mapping[str, Any]) -> None:
        if values["step"] == 3 and trainer.ranks.rank == trainer.ranks.world_size - 1:
            weight = trainer.tensors["model"]["blocks.0.attention.q.image.weight"].detach()
            (weight.to_local() if hasattr(weight, "to_local") else weight)[0, 0] = math.inf

    with trainer_of(config, Recorder(act)) as trainer, pytest.raises(TrainingDiverged) as caught:
        trainer.run()
    return [str(caught.value), *(path.name for path in list_checkpoints(Path(config.run.dir) / "checkpoints"))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_that_are_not_finite_are_never_saved(folder: Path, world_size: int) -> None:
    config = world_config(folder, {"run.dir": str(folder / f"broken-{world_size}"), "evaluate.every_steps": 99, "sample.prompts": ()})
    answers = [break_a_weight_after_step_3(config)] if world_size == 1 else shared_pool().run(break_a_weight_after_step_3, world_size, config)
    for said, *saved in answers:
        assert "step 4: weights are no longer finite" in said and saved == ["step-00000002"]


def test_without_a_base_everything_is_stored(folder: Path) -> None:
    shape = {"vocab_size": 260, "dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}
    config = world_config(folder, {"run.dir": str(folder / "transfusion"), "train.steps": 1, "sample.prompts": ()})
    config = Config.model_validate({**config.model_dump(), "model": {"recipe": "transfusion", **shape, "image": {"patcher": "linear"}}})
    train(config)
    path = list_checkpoints(Path(config.run.dir) / "checkpoints")[-1]
    assert set(read_manifest(path)["model"]["tensors"]) == {name for name, _ in build_model(config).named_parameters()}


def test_what_only_the_ranks_and_the_disk_can_tell(folder: Path) -> None:
    config = world_config(folder, {"data.validation_sources": [{"path": str(folder / "nowhere")}]})
    with pytest.raises(UserError) as caught:
        check_config(config, 3)
    assert "nowhere matches no tar file" in str(caught.value) and "global_batch_sequences=4" in str(caught.value)
    for ranks, micro, nearest in ((3, None, "the nearest is 3 or 6"), (8, None, "the nearest is 8"), (1, 3, "the nearest is 3 or 6")):
        with pytest.raises(UserError, match=nearest):
            check_config(world_config(folder, {"train.micro_batch_sequences": micro}), ranks)
    check_config(world_config(folder), 4)


def test_training_on_text_alone_beside_a_frozen_text_side_says_that_nothing_learns(folder: Path) -> None:
    source = {"path": str(folder / "world" / "train" / "texts-*.tar")}
    config = world_config(folder, {"run.dir": str(folder / "texts"), "data.sources": [source], "train.steps": 1})
    assert any("every gradient is zero" in event for event in train(config)[2])
    assert not any("every gradient is zero" in event for event in train(world_config(folder, {"run.dir": str(folder / "both"), "train.steps": 1}))[2])
