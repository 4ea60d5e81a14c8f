"""`checkpoint.frozen: copy`: a run goes on, and its checkpoints paint, after the base they came from is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.testing.runs import Recorder, trainer_of
from fusiontrain.testing.training import world_config, write_base
from fusiontrain.train.build import check_config
from fusiontrain.train.checkpoint import DamagedCheckpoint, list_checkpoints, verify_checkpoint
from fusiontrain.train.checkpoint.base import with_base
from fusiontrain.train.inference import load_for_inference
from fusiontrain.utils.errors import UserError


def train(config: Config) -> dict[str, torch.Tensor]:
    config = with_base(config)
    check_config(config, 1)
    with trainer_of(config, Recorder()) as trainer:
        trainer.run()
        return {f"{group}/{name}": tensor.clone() for group, part in trainer.tensors.items() for name, tensor in part.items()}


def test_nothing_needs_the_base_any_more(tmp_path: Path) -> None:
    few = {"evaluate.every_steps": 99, "sample.prompts": (), "checkpoint.every_steps": 1, "checkpoint.frozen": "copy", "checkpoint.keep_last": 2}
    wanted = train(world_config(tmp_path, {"run.dir": str(tmp_path / "whole"), **few}))
    config = world_config(tmp_path, {"run.dir": str(tmp_path / "run"), **few})
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})}))
    painted = load_for_inference(tmp_path / "run").model.state_dict()
    shutil.rmtree(tmp_path / "base")

    without = load_for_inference(tmp_path / "run")
    assert all(torch.equal(tensor, painted[name]) for name, tensor in without.model.state_dict().items())
    resumed = train(config)
    assert resumed.keys() == wanted.keys() and all(torch.equal(tensor, resumed[name]) for name, tensor in wanted.items())

    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000003", "step-00000004"] and [verify_checkpoint(path) for path in checkpoints] == [[], []]
    weights = [path / "base" / "model.safetensors" for path in checkpoints]
    assert weights[0].samefile(weights[1]), "a later checkpoint costs no more room"
    assert load_for_inference(checkpoints[-1]).checkpoint == checkpoints[-1]

    write_base(tmp_path / "base", seed=99)
    with pytest.raises(UserError, match=r"its base was .*, and .*base has other weights"):
        train(config)
    with weights[1].open("r+b") as file:
        file.seek(-3, 2)
        byte = file.read(1)
        file.seek(-3, 2)
        file.write(bytes([byte[0] ^ 1]))
    assert verify_checkpoint(checkpoints[1]) == [f"{weights[1]}: does not match its checksum"]
    with pytest.raises(UserError, match=r"model\.safetensors: does not match its checksum"):
        load_for_inference(checkpoints[1])
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: does not match its checksum, and model\.base=.* is not there"):
        train(config)
    shutil.copyfile(weights[0], tmp_path / "other")
    weights[0].unlink()
    shutil.copyfile(tmp_path / "other", weights[0])  # no link any more, and as damaged as before
    with weights[0].open("r+b") as file:
        file.seek(-3, 2)
        file.write(byte)
    assert with_base(config).model.base == str(weights[0].parent), "the newest copy that is sound"
