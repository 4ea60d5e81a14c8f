"""A run that goes back loses nothing of the future that it leaves, and mixes nothing of it with its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusiontrain.train.metrics import read_metrics
from fusiontrain.train.set_aside import set_aside_future


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of six steps with checkpoints and samples of every second one."""
    for step in (2, 4, 6):
        for name in ("checkpoints", "samples"):
            (tmp_path / name / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:08d}/manifest.json").touch()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 7)))
    (tmp_path / "bad_steps.jsonl").write_text('{"step": 2}\n')
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_what_is_later_is_kept_under_other_names(run: Path) -> None:
    (said,) = set_aside_future(run, 2, "resumed from x")
    assert said.startswith(f"resumed from x: what {run} held (2 checkpoints, lines of metrics, samples) is set aside") and ".stale" in said
    expected = ["step-00000002", "step-00000004.stale", "step-00000006.stale"]
    assert names(run / "checkpoints") == expected and names(run / "samples") == expected
    assert steps(run / "metrics.jsonl") == [1, 2] and steps(run / "metrics.jsonl.stale") == [1, 2, 3, 4, 5, 6]
    assert names(run) == ["bad_steps.jsonl", "checkpoints", "metrics.jsonl", "metrics.jsonl.stale", "samples"], "no line of bad_steps.jsonl went"
    assert set_aside_future(run, 2, "again") == []


def test_a_new_start_sets_all_aside_and_a_second_one_replaces_nothing(run: Path) -> None:
    set_aside_future(run, 0, "anew")
    assert names(run / "checkpoints") == [f"step-0000000{step}.stale" for step in (2, 4, 6)] and steps(run / "metrics.jsonl") == []
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (said,) = set_aside_future(run, 0, "anew")
    assert "(lines of metrics)" in said
    assert steps(run / "metrics.jsonl.stale-2") == [1] and len(steps(run / "metrics.jsonl.stale")) == 6
    assert set_aside_future(run, 0, "anew") == []


def test_lines_behind_the_last_checkpoint_are_those_of_steps_to_come(run: Path) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 9)))
    assert set_aside_future(run, 6, "resumed") == [] and not list(run.glob("*.stale"))
