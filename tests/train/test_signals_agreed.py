"""A stop that only one rank was asked for ends all of them at the same place, wherever that is, and a stop that takes too long is cut short."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusiontrain.cli.main import main
from fusiontrain.cli.reporters import PlainReporter
from fusiontrain.config.load import to_yaml
from fusiontrain.parallel.mesh import read_ranks
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.runs import Recorder, trainer_of
from fusiontrain.testing.training import world_config
from fusiontrain.train.build import build_trainer
from fusiontrain.train.checkpoint import list_checkpoints
from fusiontrain.train.metrics import read_metrics
from fusiontrain.train.signals import BreakOff, StopRequest

ROOT = Path(__file__).parents[2]


class StopAtCheck(StopRequest):
    """Asked for at the n-th time that this rank looks; never with None."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.left = number

    def check(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.set("SIGTERM")
        super().check()


def stop_in_the_middle(folder: str, overrides: dict, number: int) -> tuple[bool, int, int, list[str]]:
    """On rank 1 alone, after the checks of the start: whether the run got to its end, its step, the checks that were left, and what it said."""
    recorder, stop = Recorder(), StopAtCheck(number if read_ranks().rank == 1 else None)
    with trainer_of(world_config(Path(folder), overrides), recorder, stop) as trainer:
        finished = trainer.run()
        return finished, trainer.state.step, stop.left or 0, recorder.events


CHECKS_OF_THE_START = 4


@pytest.mark.parametrize(
    ("overrides", "checks", "told"),
    [
        ({}, CHECKS_OF_THE_START + 1, "validation"),
        ({"evaluate.every_steps": None, "sample.every_steps": 2, "sample.steps": 5}, CHECKS_OF_THE_START + 3, "samples in"),
    ],
    ids=["evaluation", "samples"],
)
def test_a_stop_breaks_off_what_can_be_given_up_and_saves(tmp_path: Path, overrides: dict, checks: int, told: str) -> None:
    world_config(tmp_path)
    answers = shared_pool().run(stop_in_the_middle, 2, str(tmp_path), {**overrides, "checkpoint.every_steps": 100}, checks)
    assert [answer[:3] for answer in answers] == [(False, 2, 0)] * 2
    assert not [event for event in answers[0][3] if told in event], "it was broken off"
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000002"]
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2]


def stop_at_once(folder: str) -> str:
    """What becomes of a start that rank 1 was asked to leave before it began."""
    ranks, stop = read_ranks(), StopRequest()
    if ranks.rank == 1:
        stop.set("SIGTERM")
    try:
        build_trainer(world_config(Path(folder)), ranks, Recorder(), stop)
    except BreakOff:
        return "left"
    return "built"


def test_all_ranks_leave_a_start_that_one_was_asked_to_leave(tmp_path: Path) -> None:
    world_config(tmp_path)
    assert shared_pool().run(stop_at_once, 2, str(tmp_path)) == ["left", "left"]
    assert not (tmp_path / "run").exists()


def test_a_signal_while_shards_are_indexed_ends_the_command_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def ask(self: PlainReporter, done: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(PlainReporter, "indexing", ask)
    (tmp_path / "config.yaml").write_text(to_yaml(world_config(tmp_path)))
    assert main(["train", str(tmp_path / "config.yaml"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"run": str(tmp_path / "run"), "step": None, "finished": False, "checkpoint": None}
    assert "stopped before the first step" in err


HANG = """
import sys, time
from pathlib import Path
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.train.progress import Progress
from fusiontrain.train.signals import stop_on_signals
from fusiontrain.train.watchdog import Watchdog
say = lambda text: print(text, flush=True)
with stop_on_signals() as stop, Watchdog(Path(sys.argv[1]), Ranks(), Progress(), stop, 300, 0.5, say):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_stop_that_takes_longer_than_the_grace_is_ended(tmp_path: Path) -> None:
    """And a report that is asked for by a signal is written on the way."""
    (tmp_path / "logs").mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with subprocess.Popen([sys.executable, "-c", HANG, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGQUIT)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=50)
    assert process.returncode == 1
    assert "did not within checkpoint.grace_seconds=0.5: it is in start of step 0" in out
    report = (tmp_path / "logs/rank-0.report.txt").read_text()
    assert "time.sleep" not in report and 'File "<string>", line 11 in <module>' in report, "stacks of all threads"
