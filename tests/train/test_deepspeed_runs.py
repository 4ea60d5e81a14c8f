"""Whole runs with the DeepSpeed engine: its checkpoints are ours, to and from any engine, stage and number of ranks."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.runs import trainer_of
from fusiontrain.testing.training import full_tensors, world_config
from fusiontrain.train.checkpoint import list_checkpoints, verify_checkpoint
from fusiontrain.train.inference import load_for_inference
from fusiontrain.train.metrics import read_metrics

pytest.importorskip("deepspeed")

TRANSFUSION = {"recipe": "transfusion", "vocab_size": 260, "dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48, "image": {"patcher": "linear"}}
Way = tuple[int, int]
"""(ZeRO stage, ranks); stage 0 is FSDP2."""


def train(config: Config) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor | None]]:
    """What a run begins with (resumed as its config says) and what it ends with, every stored tensor, gathered."""
    with trainer_of(config) as trainer:
        tensors = {f"{group}/{name}": tensor for group, part in trainer.tensors.items() for name, tensor in part.items()}
        begun = full_tensors(tensors)
        trainer.run()
        return begun, full_tensors(tensors)


def run(config: Config, world_size: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    # DeepSpeed numbers modules per process and compares the numbers over ranks: the pool's must have started it equally often.
    return shared_pool().run(train, world_size, config)[0] if world_size > 1 else train(config)


def config_of(folder: Path, name: str, way: Way, overrides: Mapping[str, Any] | None = None) -> Config:
    engine = {"parallel.engine": "deepspeed", "parallel.zero_stage": way[0]} if way[0] else {}
    return world_config(folder, {"run.dir": str(folder / name), **engine, **(overrides or {})})


def losses(config: Config) -> list[tuple[float, ...]]:
    keys = ("loss", "grad_norm", "flops", "validation/text", "validation/image")
    return [tuple(line[key] for key in keys if key in line) for line in read_metrics(Path(config.run.dir) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[Way, tuple[Config, dict[str, torch.Tensor]]]:
    """Uninterrupted runs of four steps, with checkpoints after two and four."""
    configs = {way: config_of(folder, "whole-{}-{}".format(*way), way) for way in [(0, 1), (1, 2), (2, 2), (3, 2)]}
    return {way: (config, run(config, way[1])[1]) for way, config in configs.items()}


def test_losses_norms_validation_and_pictures_are_those_of_fsdp2(whole) -> None:
    wanted, _ = whole[0, 1]
    for way, (config, _) in whole.items():
        for got, expected in zip(losses(config), losses(wanted), strict=True):
            assert got == pytest.approx(expected, rel=1e-5), way
        assert (Path(config.run.dir) / "samples" / "step-00000004" / "grid.png").is_file()
        for checkpoint in list_checkpoints(Path(config.run.dir) / "checkpoints"):
            assert verify_checkpoint(checkpoint) == []


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [((1, 2), (1, 2)), ((2, 2), (2, 2)), ((3, 2), (3, 2)), ((3, 2), (3, 1)), ((2, 2), (1, 1)), ((0, 1), (2, 2)), ((0, 1), (3, 2)), ((3, 2), (0, 2))],
    ids=lambda way: "{}x{}".format(*way),
)
def test_a_run_continues_from_any_engine_stage_and_number_of_ranks(folder: Path, whole, saved: Way, resumed: Way) -> None:
    before, ended = whole[saved]
    name = "resumed-{}-{}-{}-{}".format(*saved, *resumed)
    shutil.copytree(before.run.dir, folder / name)
    shutil.rmtree(folder / name / "checkpoints" / "step-00000004")
    config = config_of(folder, name, resumed)
    begun, got = run(config, resumed[1])
    loaded = load_for_inference(folder / name / "checkpoints" / "step-00000002").model
    for parameter_name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(begun[f"model/{parameter_name}"], parameter), parameter_name
    assert got.keys() == ended.keys()
    exact = saved == resumed
    for key, tensor in ended.items():
        torch.testing.assert_close(got[key], tensor, atol=0 if exact else 2e-4, rtol=0 if exact else 1e-3, msg=lambda text, key=key: f"{key}: {text}")
    for values, expected in zip(losses(config), losses(before), strict=True):
        assert values == pytest.approx(expected, rel=0 if exact else 1e-5)


@pytest.mark.parametrize("way", [(2, 2), (3, 2)], ids=lambda way: "{}x{}".format(*way))
def test_without_a_base_everything_is_stored(folder: Path, way: Way) -> None:
    config = config_of(folder, "all-{}-{}".format(*way), way, {"train.steps": 2, "sample.prompts": ()})
    config = Config.model_validate({**config.model_dump(), "model": TRANSFUSION})
    _, ended = run(config, way[1])
    for name, parameter in load_for_inference(config.run.dir).model.named_parameters():
        assert torch.equal(ended[f"model/{name}"], parameter), name


def test_stages_save_the_same(whole) -> None:
    for (_, one), (_, other) in itertools.combinations(whole.values(), 2):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], atol=2e-4, rtol=1e-3)
