"""The whole path, as a user runs it: the one-minute demo and the debug configs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def fusiontrain(*argv: str, cwd: Path, timeout: int = 400) -> subprocess.CompletedProcess[str]:
    import os

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([sys.executable, "-m", "fusiontrain", *argv], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The folder of a finished `fusiontrain demo --fast`."""
    folder = tmp_path_factory.mktemp("demo")
    result = fusiontrain("demo", "--fast", "--out", "out", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "stdout.json").write_text(result.stdout)
    return folder


def test_the_demo_leaves_a_report_that_holds_what_it_promises(demo):
    report = json.loads((demo / "out" / "report.json").read_text())
    assert report == json.loads((demo / "stdout.json").read_text())
    assert report["text_logits_identical"] is True
    assert report["text_tokens_compared"] > 100
    assert report["resume_identical"] is True
    assert report["steps_compared"] >= 1
    for name in ("color", "shape", "place", "caption"):
        assert 0 <= report[f"{name}_accuracy"] <= 1
    assert report["loss/image"]["end"] < report["loss/image"]["start"]
    assert report["tokens_per_second"] > 0
    assert 0 < sum(report["stage_seconds"].values()) <= report["seconds"]
    assert len(report["samples"]) == 8
    for sample in report["samples"]:
        assert Image.open(demo / "out" / sample["file"]).size == (32, 32)
        assert sample["prompt"]
    assert Image.open(demo / "out" / "contact_sheet.png").width > 200
    assert "A language model that learnt to paint" in (demo / "out" / "report.md").read_text()


def test_its_run_folder_is_whole(demo):
    run = demo / "out" / "lmfusion"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31)), "the stop and the resume neither lost nor repeated a step"
    keys = {"loss", "loss/text", "loss/image", "grad_norm", "lr", "tokens", "tokens/text", "tokens/image", "tokens_per_second", "step_seconds"}
    assert keys | {"data_seconds", "flops", "mfu", "memory_gib", "skipped"} <= set(rows[0])
    assert rows[0]["mfu"] is None, "no peak is invented for a CPU"
    assert any("validation/image" in row for row in rows)
    assert (run / "config.yaml").is_file()
    assert list((run / "tensorboard").iterdir())
    assert list((run / "samples").glob("step-*/*.png"))
    assert {path.name for path in (run / "logs").iterdir()} >= {"rank-0.log", "rank-1.log"}


def test_a_trained_model_can_be_sampled_evaluated_and_verified(demo):
    run = "out/lmfusion"
    result = fusiontrain("evaluate", run, "--judge", "4", "evaluate.batches=1", "--json", cwd=demo)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert {"text", "image"} == set(report["validation"])
    assert "color_accuracy" in report["scores"]
    picture = str(demo / "out" / "pictures" / "000.png")
    steps = ["--steps", "2"]
    paint, interleave = ["--prompt", "a large red circle at the top left.", *steps], ["--prompt", "look:", "--image", picture, *steps]
    for arguments in (paint, ["--image", picture], interleave):
        result = fusiontrain("sample", run, *arguments, "--out", "sampled", "--json", cwd=demo)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["samples"]
    result = fusiontrain("checkpoint", "verify", run, cwd=demo)
    assert result.returncode == 0, result.stderr


def test_the_demo_never_empties_a_folder_of_yours(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = fusiontrain("demo", "--fast", "--out", ".", cwd=tmp_path)
    assert result.returncode == 2
    assert "not made by the demo" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_debug_config_makes_its_world_and_trains(tmp_path):
    config = str(ROOT / "configs" / "debug" / "lmfusion.yaml")
    small = ["train.steps=3", "optimizer.warmup_steps=1", "demo.documents=60", "sample.every_steps=3", "sample.steps=2", "evaluate.every_steps=3"]
    result = fusiontrain("train", config, *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "runs/debug/lmfusion/metrics.jsonl").read_text().splitlines()) == 3
    again = fusiontrain("train", config, *small, "run.dir=runs/again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    losses = [[json.loads(line)["loss"] for line in (tmp_path / f"runs/{run}/metrics.jsonl").open()] for run in ("debug/lmfusion", "again")]
    assert losses[0] == losses[1], "the same seed is the same run"
