"""A run on a real Slurm of one machine and two nodes: preempted, requeued, told of its time limit, cancelled, and it always goes on where it was.

Takes minutes, so it is asked for: `make test-slurm`. `tests/launch/mini_slurm.sh install` installs Slurm on Debian and Ubuntu.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MINI_SLURM = ROOT / "tests" / "launch" / "mini_slurm.sh"
CONFIG = ROOT / "configs" / "debug" / "lmfusion.yaml"
PATIENCE_SECONDS = 600
"""For anything at all, on a machine that others use too."""
LIVING = ("PENDING", "RUNNING", "COMPLETING")
ENDLESS = ["train.steps=100000", "checkpoint.every_steps=100000", "evaluate.every_steps=100000", "sample.every_steps=100000"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("FUSIONTRAIN_TEST_SLURM") != "1", reason="starts a Slurm and takes minutes: make test-slurm"),
]


class Cluster:
    """The Slurm of this module and the folder that its jobs run in."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def call(self, *command: str) -> str:
        result = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def launch(self, run: str, *more: str) -> dict:
        line = ("launch", "slurm", str(CONFIG), f"run.dir={run}", "--nodes=2", "--gpus-per-node=0", "--procs-per-node=1", "--json", *more)
        return json.loads(self.call(sys.executable, "-m", "fusiontrain", *line))

    def preempt(self) -> None:
        self.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    def state(self, job: int) -> str:
        return re.search(r"JobState=(\S+)", self.call("scontrol", "show", "job", str(job))).group(1)

    def log(self, run: str, job: int) -> str:
        path = self.folder / run / "slurm" / "logs" / f"job-{job}.log"
        return path.read_text() if path.is_file() else ""

    def wait(self, what, log) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not what():
            assert time.monotonic() < deadline, log()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [program for program in ("slurmctld", "slurmd", "sbatch", "squeue") if shutil.which(program) is None]
    assert not missing, f"Slurm is not installed ({', '.join(missing)} missing): as root, tests/launch/mini_slurm.sh install"
    folder = tmp_path_factory.mktemp("cluster")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        "PORT": str(free_ports(3)), "WHILE_PID": str(os.getpid()), "KILL_WAIT": "300", "GRACE": "300", "SLURMD_TIMEOUT": "300",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    subprocess.run([MINI_SLURM, "start", folder / "slurm", "2"], env=environment, check=True, timeout=PATIENCE_SECONDS)
    try:
        yield Cluster(folder, {**environment, "SLURM_CONF": str(folder / "slurm" / "slurm.conf")})
    finally:
        subprocess.run([MINI_SLURM, "stop", folder / "slurm"], check=True, timeout=PATIENCE_SECONDS)
        assert processes_of(folder / "slurm") == []


def processes_of(slurm: Path) -> list[str]:
    """Whatever runs with that Slurm's configuration, daemons and jobs."""
    mark, found = f"SLURM_CONF={slurm}/slurm.conf".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is somebody else's
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def free_ports(number: int) -> int:
    """The first of `number` neighbouring ports that nobody listens on."""
    for first in range(27000, 29000, number):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + number):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


def steps_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def losses_of(run: Path) -> list[tuple[int, float]]:
    return [(values["step"], values["loss"]) for values in steps_of(run)]


def test_an_interrupted_run_has_the_losses_of_one_that_was_not(cluster):
    """The run is far longer than it can become, so however slow or quick the machine is, every interruption meets it in the middle."""
    # A rate that does not fall, for the run is given fewer steps in the end.
    settings = [*ENDLESS, "optimizer.learning_rate=0.001", "optimizer.final_learning_rate=0.001"]
    job = cluster.launch("interrupted", *settings)["job"]
    run, starts = cluster.folder / "interrupted", 1

    def log() -> str:
        return cluster.log("interrupted", job)

    def train_further() -> None:
        done = len(steps_of(run))
        cluster.wait(lambda: len(steps_of(run)) > done + 2, log)

    interruptions = [
        cluster.preempt,
        lambda: cluster.call("scontrol", "requeue", str(job)),
        lambda: cluster.call("scancel", "--batch", "--signal=USR1", str(job)),
    ]
    for interrupt in interruptions:
        train_further()
        interrupt()
        starts += 1
        cluster.wait(lambda number=starts: f"start {number}: on" in log(), log)
    train_further()
    cluster.call("scontrol", "update", f"JobId={job}", "Requeue=0")
    cluster.call("scancel", "--signal=TERM", str(job))
    cluster.wait(lambda: cluster.state(job) not in LIVING, log)
    assert re.findall(r"(preempted|time limit), at step \d+ of \d+: requeued", log()) == ["preempted", "time limit"]
    began = [int(step) for step in re.findall(r"start \d: on n\[1-2\], from step (\d+) of \d+", log())]
    assert len(began) == 4 and began[0] == 0 and began == sorted(set(began)), "every start goes on from a later checkpoint"
    (stopped,) = [int(step) for step in re.findall(r"at step (\d+) of \d+; requeueing is off, submit again to resume", log())]
    assert stopped > began[-1]
    assert (run / "slurm" / "logs" / f"job-{job}-0" / "node-1").is_dir()

    steps = stopped + 3
    finish = [*settings, f"train.steps={steps}"]
    again = cluster.launch("interrupted", *finish)
    assert again["step"] == stopped and again["job"] != job
    cluster.wait(lambda: cluster.state(again["job"]) not in LIVING, lambda: cluster.log("interrupted", again["job"]))
    assert cluster.state(again["job"]) == "COMPLETED", cluster.log("interrupted", again["job"])
    idle = cluster.launch("interrupted", *finish)
    assert idle["job"] is None and idle["step"] == steps

    reference = cluster.launch("reference", *finish)["job"]
    cluster.wait(lambda: cluster.state(reference) not in LIVING, lambda: cluster.log("reference", reference))
    assert losses_of(run) == losses_of(cluster.folder / "reference")
    assert [step for step, _ in losses_of(run)] == list(range(1, steps + 1))


def test_a_cancelled_job_stays_cancelled_and_the_same_line_resumes_it(cluster):
    job = cluster.launch("cancelled", *ENDLESS)["job"]
    cluster.wait(lambda: len(steps_of(cluster.folder / "cancelled")) > 2, lambda: cluster.log("cancelled", job))
    line = ["launch", "slurm", str(CONFIG), "run.dir=cancelled", *ENDLESS, "--nodes=2", "--gpus-per-node=0", "--procs-per-node=1"]
    busy = subprocess.run([sys.executable, "-m", "fusiontrain", *line], cwd=cluster.folder, env=cluster.environment, capture_output=True, text=True)
    assert busy.returncode == 2 and f"its job {job} is RUNNING" in busy.stderr
    cluster.call("scancel", str(job))
    cluster.wait(lambda: cluster.call("squeue", "--noheader") == "", lambda: cluster.log("cancelled", job))
    assert cluster.state(job) == "CANCELLED"
    again = cluster.launch("cancelled", *ENDLESS)
    assert again["job"] != job and again["step"] >= 3
    resumed = f"from step {again['step']} of 100000"
    cluster.wait(lambda: resumed in cluster.log("cancelled", again["job"]), lambda: cluster.log("cancelled", again["job"]))
    cluster.call("scancel", str(again["job"]))


def test_a_run_that_cannot_get_further_is_not_requeued(cluster):
    job = cluster.launch("broken", "optimizer.learning_rate=1e30", "train.max_skipped_in_a_row=1")["job"]
    cluster.wait(lambda: cluster.state(job) not in LIVING, lambda: cluster.log("broken", job))
    assert cluster.state(job) == "FAILED"
    assert "without a new checkpoint, at step 0 of 40: not requeued" in cluster.log("broken", job)
