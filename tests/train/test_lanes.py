"""Training in lanes: interrupted and resumed it is the same run, and other data are taken only when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusiontrain.testing.runs import trainer_of
from fusiontrain.testing.training import world_config
from fusiontrain.train.metrics import read_metrics
from fusiontrain.utils.errors import UserError


def losses(folder: Path, name: str, steps: int, **overrides: Any) -> list[tuple[int, float]]:
    """(step, loss) of every step in the run folder, after training up to `steps`."""
    settings = {
        "run.dir": str(folder / name), "train.steps": steps, "data.io_mode": "lanes", "data.lanes": 2, "sample.prompts": [],
        "model.image": {"patcher": "linear"}, "optimizer.warmup_steps": 0, "optimizer.learning_rate": 1e-3, "optimizer.final_learning_rate": 1e-3,
    }  # fmt: skip
    with trainer_of(world_config(folder, settings | overrides)) as trainer:
        trainer.run()
    return [(line["step"], line["loss"]) for line in read_metrics(folder / name / "metrics.jsonl")]


def test_a_run_in_lanes_resumes_exactly_and_refuses_another_order(tmp_path):
    whole = losses(tmp_path, "whole", 6)
    assert losses(tmp_path, "parts", 2) == whole[:2]
    assert losses(tmp_path, "parts", 3) == whole[:3]
    assert losses(tmp_path, "parts", 6) == whole
    for changed in ({"data.lanes": 4}, {"data.io_mode": "global"}):
        with pytest.raises(UserError, match=f"{min(changed)} differs"):
            losses(tmp_path, "parts", 7, **changed)
    accepted = {"checkpoint.accept_data_change": True}
    there = losses(tmp_path, "parts", 8, **{"data.io_mode": "global"}, **accepted)
    back = losses(tmp_path, "parts", 10, **{"data.lanes": 4}, **accepted)
    assert there[:6] == whole and back[:8] == there
    assert [step for step, _ in back] == list(range(1, 11))
