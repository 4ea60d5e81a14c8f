"""Runs of several processes whose ranks are killed, stopped and asked: the short form of `make soak`.

Every start of torchrun takes ten seconds of the processor, so each test does several things to one run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.runs import Recorder, trainer_of
from fusiontrain.testing.training import world_config
from fusiontrain.train.checkpoint import list_checkpoints, verify_checkpoint
from fusiontrain.train.metrics import read_metrics
from fusiontrain.utils.errors import UserError

SOAK = Path(__file__).parents[1] / "soak"


def load(name: str):
    """A script of tests/soak as a module."""
    spec = importlib.util.spec_from_file_location(f"soak_{name}", SOAK / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train(config: str, run_dir: str) -> None:
    """A run that nobody disturbs, on the ranks of this pool."""
    from fusiontrain.config.load import load as load_config

    with trainer_of(load_config(config, [f"run.dir={run_dir}"])) as trainer:
        trainer.run()


@pytest.mark.slow
def test_a_killed_rank_and_a_killed_agent_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """One rank in the middle of a save, which torchrun restarts; then the agent, whose ranks must not live on; lines of metrics as undisturbed."""
    kills = load("kills")
    config = kills.make_config(tmp_path)
    shared_pool().run(train, 2, str(config), str(tmp_path / "reference-2"), timeout_seconds=120)
    done, lines = kills.killed_run(tmp_path, [2], 2, random.Random(0), [("rank", "save"), ("agent", "step")])
    assert [(kill.kind, kill.ranks) for kill in done] == [("rank", 2), ("agent", 2)]
    assert lines == kills.FINISHED


def test_a_difference_would_be_found(tmp_path: Path) -> None:
    kills = load("kills")
    lines = [{"step": step, "loss": 1.0 + step, "validation/text": 2.0, "step_seconds": 0.1 * step} for step in (1, 2, 3)]
    assert kills.compare(lines, [{**line, "step_seconds": 0.0} for line in lines], 0.0, tmp_path) == 3
    for broken in (lines[:2], [lines[0], *lines], [*lines[:2], {**lines[2], "loss": 4.001}], [*lines[:2], {**lines[2], "loss": None}]):
        with pytest.raises(kills.Lost):
            kills.compare(lines, broken, 1e-4, tmp_path)


@pytest.mark.slow
def test_a_rank_that_no_longer_runs_is_named_and_every_rank_reports_when_asked(tmp_path: Path) -> None:
    """SIGQUIT to one rank: reports of both, and the training goes on. Then rank 1 is stopped for good, as by a machine that hangs."""
    kills = load("kills")
    run = kills.Run(kills.make_config(tmp_path), tmp_path / "run", ("parallel.timeout_seconds=4", "train.steps=100000", "checkpoint.every_steps=100000"))
    try:
        run.start(2)
        run.until(lambda: run.last_step() >= 2, "step 2")
        ranks = {rank: int(re.findall(r"process (\d+), rank", (tmp_path / f"run/logs/rank-{rank}.log").read_text())[-1]) for rank in (0, 1)}
        reports = [tmp_path / f"run/logs/rank-{rank}.report.txt" for rank in (0, 1)]
        kills.send(ranks[0], signal.SIGQUIT)
        run.until(lambda: all(path.exists() and "trainer.py" in path.read_text() for path in reports), "the reports")
        assert all("forward and backward" in path.read_text() and "last collective: gloo:" in path.read_text() for path in reports)
        step = run.last_step()
        run.until(lambda: run.last_step() > step + 1, "the next steps")
        kills.send(ranks[1], signal.SIGSTOP)
        run.until(lambda: "is stopped or cut off" in run.output.read_text(), "the sentence")
        kills.send(ranks[1], signal.SIGKILL)  # as the agent would, half a minute later
    finally:
        run.close()
    (said,) = re.findall(r"^fusiontrain: error: (.*)$", run.output.read_text(), re.MULTILINE)
    assert re.match(rf"rank 0 waited \d+ s in .* of step \d+, gloo:\w+ number \d+ of group 0 for rank 1, whose process {ranks[1]} on ", said)
    assert re.search(r"is stopped or cut off; it was last heard of in .* of step \d+, \d+ s ago", said)


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path: Path) -> None:
    """An agent and a rank in each of two network namespaces, with a cable between them; what a cut does takes a minute, and is in `make soak`."""
    two = load("two_hosts")
    try:
        with two.two_hosts("probe"):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    found = two.train_on_two_hosts(tmp_path, 4)
    shared_pool().run(train, 2, str(tmp_path / "config.yaml"), str(tmp_path / "one"), timeout_seconds=120)
    assert found == two.losses(tmp_path / "one") and len(found) == 4


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_and_a_read_only_disk_end_a_run_with_one_sentence(tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture) -> None:
    """What was saved before stands, and the run goes on when there is room again."""
    values = {"train.steps": 20, "checkpoint.every_steps": 2, "checkpoint.keep_last": 100, "evaluate.every_steps": None, "sample.prompts": ()}
    (tmp_path / "config.yaml").write_text(to_yaml(world_config(tmp_path, {**values, "run.dir": str(small_disk / "run")})))
    command = ["train", str(tmp_path / "config.yaml"), "train.log_every_steps=100"]

    def said() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusiontrain: error")]

    assert main(command) == 2
    (sentence,) = said()
    assert str(small_disk) in sentence and ("cannot be saved" in sentence or "cannot be written" in sentence)
    assert main(["checkpoint", "list", str(small_disk / "run"), "--json"]) == 0
    saved = [row["step"] for row in json.loads(capsys.readouterr().out)["checkpoints"]]
    assert saved and saved == list(range(2, 2 * len(saved) + 1, 2)) and len(saved) < 10
    assert main(["checkpoint", "verify", str(small_disk / "run")]) == 0

    remount(small_disk, "ro")
    capsys.readouterr()
    assert main(command) == 2
    assert len(said()) == 1

    remount(small_disk, "rw,size=100m")
    assert main(command) == 0
    assert f"from step {saved[-1]} to 20" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(small_disk / "run/metrics.jsonl")] == list(range(1, 21))


class Breaker(Recorder):
    """Breaks the disk as soon as the run knows that its first checkpoint is complete."""

    def __init__(self, break_disk: Callable[[], object]) -> None:
        super().__init__()
        self.break_disk = break_disk

    def event(self, text: str) -> None:
        super().event(text)
        if text.startswith("step 2: saved"):
            self.break_disk()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_checkpoints_that_can_no_longer_be_written_end_a_run_and_the_last_one_stands(
    tmp_path: Path, small_disk: Path, fault: str, asynchronous: bool
) -> None:
    """They have a disk of their own: metrics and logs can still be written. With room again, the run goes on from the last one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(small_disk)
    filler = small_disk / "filler"
    break_disk, mend = {
        "full": (lambda: filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192)), filler.unlink),
        "read-only": (lambda: remount(small_disk, "ro"), lambda: remount(small_disk, "rw")),
    }[fault]
    values = {"train.steps": 8, "checkpoint.every_steps": 2, "checkpoint.asynchronous": asynchronous, "evaluate.every_steps": None, "sample.prompts": ()}
    config = world_config(tmp_path, values)
    remedy = {"full": r"No space left[^\n]*make room", "read-only": "let this user write there"}[fault]
    sentence = rf"step-00000004: cannot be saved [^\n]*{remedy} and run the same command again$"
    with pytest.raises(UserError, match=sentence), trainer_of(config, Breaker(break_disk)) as trainer:
        trainer.run()
    (left,) = list_checkpoints(small_disk)
    assert left.name == "step-00000002" and verify_checkpoint(left) == []
    steps = [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and 4 <= len(steps) <= 6, "it ends when it knows"
    mend()
    recorder = Recorder()
    with trainer_of(config, recorder) as trainer:
        assert trainer.run()
    assert "from 2 to 8" in recorder.events
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(1, 9))


def test_training_goes_on_while_storage_is_slow_and_the_next_save_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk does not acknowledge the save of step 2 before step 4 is done: a run that waits for it in step 3 would never get there."""
    fsync, acknowledged, stood = os.fsync, threading.Event(), {}

    def slow_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "step-00000002.tmp" in path and not acknowledged.wait(60):
            raise TimeoutError(path)
        if found := re.search(r"step-0000000\d\.tmp", path):
            stood.setdefault(found.group(), [path.name for path in list_checkpoints(tmp_path / "slow/checkpoints")])
        fsync(descriptor)

    def act(values) -> None:
        if values["step"] == 4:
            assert not list_checkpoints(tmp_path / "slow/checkpoints")
            acknowledged.set()

    config = {"train.steps": 6, "checkpoint.keep_last": 9, "sample.prompts": (), "evaluate.every_steps": None}
    with trainer_of(world_config(tmp_path, {**config, "run.dir": str(tmp_path / "fast")})) as trainer:
        trainer.run()
    monkeypatch.setattr(os, "fsync", slow_fsync)
    recorder = Recorder(act)
    with trainer_of(world_config(tmp_path, {**config, "run.dir": str(tmp_path / "slow")}), recorder) as trainer:
        trainer.run()
    first, second, third = (f"step-0000000{step}" for step in (2, 4, 6))
    assert stood == {f"{first}.tmp": [], f"{second}.tmp": [first], f"{third}.tmp": [first, second]}
    assert [verify_checkpoint(path) for path in list_checkpoints(tmp_path / "slow/checkpoints")] == [[], [], []]
    assert [event.split(" saved")[0] for event in recorder.events[1:]] == ["step 2:", "step 4:", "step 6:"]
    fast, slow = ([(line["step"], line["loss"]) for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("fast", "slow"))
    assert fast == slow and len(slow) == 6
