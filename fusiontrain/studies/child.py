"""Trainings in processes of their own, as a user would start them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fusiontrain.config.load import load
from fusiontrain.utils.errors import UserError

Progress = Callable[[str, int, int], None]
"""Called with (stage, step, steps) while a training runs."""

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30.0
ENVIRONMENT = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}
"""Of the trainings, where nothing else is set; launch/env.sh has the reasons."""


def find_config(name: str) -> Path:
    """A file of `configs/`, in a checkout or where the installed package put it."""
    places = [Path(__file__).parents[2] / "configs", Path(sysconfig.get_path("data")) / "share" / "fusiontrain" / "configs"]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise UserError(f"configs/{name}: not found in {' or '.join(map(str, places))}; run the demo from a checkout")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a line that is still being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def train(
    config: Path,
    run: Path,
    overrides: Sequence[str],
    processes: int,
    progress: Progress,
    stop_after_step: int | None = None,
    resume: str = "auto",
) -> None:
    """`torchrun ... fusiontrain train`, in processes of its own; its output goes to `<run>/logs/console.log`. It ends with
    this process, whatever ends that.

    stop_after_step: send the SIGTERM that a scheduler would send once that step is done, and wait for the save. Raises UserError with the end
    of the console log if the training fails.
    """
    command = [
        *(sys.executable, "-m", "fusiontrain.studies.agent", str(os.getpid())),
        *("--standalone", "--nproc-per-node", str(processes), "-m", "fusiontrain"),
        *("train", str(config), "--resume", resume, f"run.dir={run}", *overrides),
    ]
    console = run / "logs" / "console.log"
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("a") as log, _exit_on_sigterm(), _process(command, log) as process:
        stopped = False
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            rows = read_metrics(run)
            step = rows[-1]["step"] if rows else 0
            progress(run.name, step, _total_steps(run))
            if stop_after_step is not None and step >= stop_after_step and not stopped:
                process.send_signal(signal.SIGTERM)
                stopped = True
    if process.returncode != 0 and not stopped:
        tail = "\n".join(console.read_text().splitlines()[-15:])
        raise UserError(f"the training of {run} failed with code {process.returncode}; the end of {console}:\n{tail}")


def _total_steps(run: Path) -> int:
    """`train.steps` of a run that has written its resolved config; 0 before."""
    path = run / "config.yaml"
    if not path.is_file():
        return 0
    return load(path).train.steps


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends this process by SystemExit, so that its child is asked to save and stop first. Python lets the main thread alone ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _process(command: Sequence[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is asked to end with this block, and made to after `PATIENCE_SECONDS`. See `agent.py` for when this process is killed."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**ENVIRONMENT, **os.environ})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
            process.kill()
