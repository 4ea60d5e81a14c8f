"""Trainings in processes of their own end with the process that wanted them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusiontrain.studies.child import find_config

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 60.0

PARENT = """
import sys
from pathlib import Path
from fusiontrain.studies.child import train
train(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], 1, lambda run, step, steps: step and print(step, flush=True))
"""


def descendants(pid: int) -> list[int]:
    """All processes below one, as the system has them."""
    below = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [*below, *(deeper for child in below for deeper in descendants(child))]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["asked", "killed"])
def test_nothing_of_a_training_lives_on(number, tmp_path):
    """Asked to end, the training saves first."""
    settings = ("data.tokenizer.path", "data.sources.0.path", "data.validation_sources.0.path")
    places = (tmp_path / "world/tokenizer.json", tmp_path / "world/world/train", tmp_path / "world/world/validation")
    steps = ("train.steps=100000", "train.threads=1", "evaluate.every_steps=100000", "checkpoint.every_steps=100000", "sample.every_steps=100000")
    overrides = [f"demo.dir={tmp_path / 'world'}", *(f"{key}={place}" for key, place in zip(settings, places, strict=True)), *steps]
    command = [sys.executable, "-c", PARENT, str(find_config("debug/mot_chameleon.yaml")), str(tmp_path / "run"), *overrides]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    found: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as parent:
        try:
            assert parent.stdout is not None and parent.stdout.readline().strip().isdigit(), "it trains"
            found = descendants(parent.pid)
            assert len(found) >= 2, "torchrun's agent and a rank"
            os.kill(parent.pid, number)
            assert parent.wait(LIMIT_SECONDS) == (128 + number if number == signal.SIGTERM else -number)
            deadline = time.monotonic() + LIMIT_SECONDS
            while any(map(lives, found)) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not any(map(lives, found))
        finally:
            parent.kill()
            for pid in filter(lives, found):
                os.kill(pid, signal.SIGKILL)
    assert any((tmp_path / "run" / "checkpoints").glob("step-*")) == (number == signal.SIGTERM)
