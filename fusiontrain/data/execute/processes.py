"""Worker processes as the trainer sees them.

Each has a socket of its own and one thread of the trainer that waits on it at a time. There is no queue and no lock that workers share, so one that
is killed takes nothing with it: its socket ends, and the trainer says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

import numpy as np

from fusiontrain.data.execute.build import Built
from fusiontrain.data.execute.job import DropRing, Failure, Job, MapRing, Task, unpacked
from fusiontrain.data.execute.ring import Ring
from fusiontrain.data.plan.plan import PlannedSequence
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""glibc gives large blocks back to the system at once, and each new picture would pay for its pages anew: 2.5 times the time of decoding."""


class WorkerProcess:
    """A worker, started when it is first needed. Its methods need its lock, except `kill`."""

    def __init__(self, number: int) -> None:
        self.number, self.lock = number, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._jobs: set[str] = set()
        self._rings: set[int] = set()

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def build(self, job: Job, sequences: Sequence[PlannedSequence], ring: Ring) -> tuple[Built, np.ndarray]:
        """A micro-batch whose arrays are views of a slot of `ring`, and the slot. Raises UserError where the worker does, or where it died."""
        if self._process is None:
            self._start()
        if job.name not in self._jobs:
            self._ask(job)
            self._jobs.add(job.name)
        if ring.name not in self._rings:
            self._ask(MapRing(ring.name, ring.nbytes), ring.descriptor)
            self._rings.add(ring.name)
        slot, memory = ring.lease()
        task = Task(job.name, ring.name, slot * ring.slot_bytes, ring.slot_bytes, tuple(sequences))
        return unpacked(self._ask(task), memory), memory

    def forget(self, ring: Ring) -> None:
        """Unmap a ring, which would live as long as the worker otherwise."""
        if ring.name in self._rings:
            self._rings.remove(ring.name)
            self._ask(DropRing(ring.name))

    def kill(self) -> None:
        """End it at once, from any thread: a worker has nothing to lose. A thread that waits for it gets an error."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> int | None:
        """End it and free what belongs to it; returns its exit code, None if it was not running."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        self._jobs, self._rings = set(), set()
        if process is None or connection is None:
            return None
        connection.close()
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(PATIENCE_SECONDS)
        logger.warning("data worker %d (process %d) does not end: it waits for a disk that does not answer", self.number, process.pid)
        return None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**MALLOC, **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        with theirs:
            # -P: nothing in the current folder may pass for a module. A group of its own: Ctrl-C is for the trainer.
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "fusiontrain.data.execute.worker", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment, process_group=0,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise UserError(f"data worker {self.number} cannot be started ({error.strerror}); lower data.num_workers") from error
        self._connection = Connection(ours.detach())

    def _ask(self, message: Any, descriptor: int | None = None) -> Any:
        """What the worker answers. Raises UserError and RuntimeError for what it says, UserError when it is gone."""
        assert self._connection is not None and self._process is not None
        pid = self._process.pid
        try:
            self._connection.send(message)
            if descriptor is not None:
                send_handle(self._connection, descriptor, pid)
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE_SECONDS)  # its socket ends a moment before it does
            raise UserError(f"data worker {self.number} (process {pid}) {_ending(self.close())}") from error
        if isinstance(answer, Failure):
            raise UserError(answer.message) if answer.by_user else RuntimeError(f"data worker {self.number} (process {pid}):\n{answer.message}")
        return answer


class Workers:
    """`count` worker processes, for any number of jobs and rings, and for any threads."""

    def __init__(self, count: int) -> None:
        self._all = [WorkerProcess(number) for number in range(count)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)

    @property
    def pids(self) -> list[int]:
        """The process numbers of those that run."""
        return [worker.pid for worker in self._all if worker.pid is not None]

    def build(self, job: Job, sequences: Sequence[PlannedSequence], ring: Ring) -> tuple[Built, np.ndarray]:
        """A micro-batch and the slot that it lies in, by a worker that is idle, once there is one. Raises UserError where the worker does, or
        where it dies."""
        worker = self._idle.get()
        try:
            with worker.lock:
                return worker.build(job, sequences, ring)
        finally:
            self._idle.put(worker)

    def forget(self, ring: Ring) -> None:
        """Have every worker unmap a ring that nobody builds into any more."""
        for worker in self._all:
            with worker.lock, contextlib.suppress(UserError):  # one that died has forgotten
                worker.forget(ring)

    def kill(self) -> None:
        """End all at once, so that no thread goes on waiting for one; then `close`."""
        for worker in self._all:
            worker.kill()

    def close(self) -> None:
        """End all and free what belongs to them. New ones start when they are needed."""
        for worker in self._all:
            with worker.lock:
                worker.close()


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its socket and does not end"
    if code >= 0:
        return f"ended by itself (exit code {code}); its own words are on stderr, if it had any"
    name = next((number.name for number in signal.Signals if number == -code), f"signal {-code}")
    if name == "SIGKILL":
        name += ", as the system does when memory runs out: lower data.num_workers or data.prefetch_bytes, or give the job more"
    return f"was killed by {name}"

