"""A thread beside the training of each rank, which still works when the training hangs.

It writes the rank's status into the run folder, reports stacks and timings of this rank when somebody asks, ends a stop that takes too long, and
ends a training that hangs with a sentence that names the ranks that the others wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusiontrain.parallel.mesh import Ranks
from fusiontrain.train.progress import START, Progress
from fusiontrain.train.signals import REPORT_SIGNAL, STOP_SIGNALS, StopRequest
from fusiontrain.train.status import Status, failure_of, missing_ranks, own_start, read_statuses, sentence, speaker, status_path, write_status
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

REQUEST = "REPORT"
"""Touch this file in the run's logs/ and every rank reports; a signal to any rank does that."""

POLL_SECONDS = 1.0
MOST_SECONDS_BETWEEN_STATUSES = 10.0
WITHOUT_LIMIT = (START, "save", "metrics")
"""Phases whose collectives alone have a limit, that of the process group: reading a large model and writing it to slow storage take long."""

OUT_OF_TIME = re.compile(r"timed? ?out", re.IGNORECASE)
LOST_CONNECTION = re.compile(r"timed? ?out|connection|broken pipe|gloo|nccl|socket", re.IGNORECASE)
"""What torch's errors of collectives say; they have no type of their own."""

EXIT_FAILED = 1


class Watchdog:
    """Watches over `progress` while it is open (a context manager).

    timeout_seconds: a rank that waits so long for data or for other ranks ends. grace_seconds: so long after a stop was asked for, too.
    say: tells a person one sentence.
    """

    def __init__(
        self, run_dir: Path, ranks: Ranks, progress: Progress, stop: StopRequest, timeout_seconds: float, grace_seconds: float, say: Callable[[str], None]
    ) -> None:
        self.logs, self.ranks, self.progress, self.stop, self.say = run_dir / "logs", ranks, progress, stop, say
        self.timeout_seconds, self.grace_seconds = timeout_seconds, grace_seconds
        self.period = min(MOST_SECONDS_BETWEEN_STATUSES, max(POLL_SECONDS, timeout_seconds / 10))
        self.host, self._started = socket.gethostname(), own_start()
        self._tick = 0
        self._collectives = (0, "")
        self._writing = threading.Lock()
        self._written = -self.period
        self._asked_to_stop: float | None = None
        self._last_request = self._requested_at()
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._over.set()
        self._thread.join()
        if error is not None and self.ranks.world_size > 1:
            self._write(failure=failure_of(error), told=isinstance(error, UserError))
        else:
            with contextlib.suppress(OSError):
                status_path(self.logs, self.ranks.rank).unlink(missing_ok=True)

    def end_if_lost(self, error: Exception) -> None:
        """Called by the training where it failed: ends the process with a sentence if other ranks are why, returns where `error` is this rank's own."""
        if self.ranks.world_size == 1 or not isinstance(error, RuntimeError) or not LOST_CONNECTION.search(str(error)):
            return
        logger.error("a collective failed", exc_info=error)
        with self._ending:
            self._end_for_others(self._statuses_twice() if OUT_OF_TIME.search(str(error)) else {})

    def report(self) -> None:
        """Append what this rank does, its timings and the stacks of its threads to logs/rank-N.report.txt."""
        status = self._write(look=True)
        with (self.logs / f"rank-{self.ranks.rank}.report.txt").open("a", encoding="utf-8") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{now} rank {status.rank} on {status.host}, process {status.pid}: {status.seconds:.1f} s in {status.phase} of step {status.step}")
            file.write(f"\nlast collective: {status.collective or 'none'}\n{self.progress.table()}\n")
            file.flush()
            faulthandler.dump_traceback(file)
            file.write("\n")

    def _watch(self) -> None:
        while not self._over.is_set():
            try:
                self._once(self._signals())
            except OSError:
                logger.exception("a report cannot be written")
                self._over.wait(POLL_SECONDS)

    def _once(self, numbers: set[int]) -> None:
        if REPORT_SIGNAL in numbers:
            self._request()
        if self._requested_at() != self._last_request:
            self._last_request = self._requested_at()
            self.report()
        if time.monotonic() - self._written >= self.period:
            self._write()
        self._watch_stop(bool(numbers & set(STOP_SIGNALS)))
        self._watch_progress()

    def _signals(self) -> set[int]:
        """The signals of the next POLL_SECONDS, or at once when one comes."""
        if self.stop.wake is None:
            self._over.wait(POLL_SECONDS)
            return set()
        deadline = time.monotonic() + POLL_SECONDS
        while (left := deadline - time.monotonic()) > 0 and not self._over.is_set():
            if select.select([self.stop.wake], [], [], min(left, 0.1))[0]:
                return set(os.read(self.stop.wake, 64))
        return set()

    def _watch_stop(self, signalled: bool) -> None:
        if self._asked_to_stop is None and (signalled or self.stop or self.stop.agreed):
            self._asked_to_stop = time.monotonic()
        if self._asked_to_stop is not None and time.monotonic() - self._asked_to_stop > self.grace_seconds:
            where = f"{self.progress.phase} of step {self.progress.step}"
            self._end(f"the run was asked to stop and did not within checkpoint.grace_seconds={self.grace_seconds:g}: it is in {where}; the checkpoints before "
                      "are complete", speak=self.ranks.is_main)  # fmt: skip

    def _watch_progress(self) -> None:
        progress = self.progress
        # The first step may compile.
        if progress.phase in WITHOUT_LIMIT or "optimizer" not in progress.visits or progress.still_seconds() < self.timeout_seconds:
            return
        beats, collectives = progress.beats, last_collective()
        with self._ending:
            before = self._statuses_twice()
            if progress.beats != beats:
                return
            missing = missing_ranks(self.ranks.world_size, self.host, before, self._statuses())
            if last_collective() == collectives and (missing or progress.phase == "data"):
                self._end_for_others(before)
            progress.beat()  # a long step, which all ranks are in, or whose collectives go on: look again later

    def _statuses_twice(self) -> dict[int, Status]:
        """The statuses of all ranks; when this returns, every rank that lives has written another one, and a report."""
        statuses = self._statuses()
        self._request()
        self._last_request = self._requested_at()
        self.report()
        deadline = time.monotonic() + 2 * self.period + POLL_SECONDS
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 2)
            self._write()
        return statuses

    def _end_for_others(self, before: dict[int, Status]) -> None:
        """End with a sentence about the ranks that this one waits for. before: statuses of a while ago, empty where nothing was waited for."""
        statuses = self._statuses()
        missing = missing_ranks(self.ranks.world_size, self.host, before, statuses)
        text = sentence(self._write(look=True), missing)
        told = any(statuses[rank].told for rank in missing if rank in statuses)
        if before:
            text += f"; stacks and timings of the ranks that answered: {self.logs}/rank-*.report.txt"
        self._end(text, speak=not told and speaker(self.ranks.world_size, list(missing)) == self.ranks.rank)

    def _end(self, text: str, speak: bool) -> None:
        logger.error("%s", text)
        if speak:
            self._write(told=True)  # who finds this rank gone need not tell of that
            self.say(text)
        end_now()

    def _statuses(self) -> dict[int, Status]:
        return read_statuses(self.logs, self.ranks.world_size)

    def _write(self, look: bool = False, failure: str = "", told: bool = False) -> Status:
        """Write this rank's status, and return it. look: into the record of collectives too, which takes a moment."""
        progress = self.progress
        with self._writing:
            if look:
                self._collectives = last_collective()
            self._tick, self._written = self._tick + 1, time.monotonic()
            where = (progress.step, progress.phase, progress.phase_seconds())
            status = Status(self.ranks.rank, self.host, os.getpid(), self._started, self._tick, *where, *self._collectives, failure, told, time.time())
            with contextlib.suppress(OSError):  # a full or absent disk: the training itself will say so
                write_status(self.logs, status)
        return status

    def _requested_at(self) -> int:
        try:
            return (self.logs / REQUEST).stat().st_mtime_ns
        except OSError:
            return 0

    def _request(self) -> None:
        """Ask all ranks to report, unless somebody has just done so."""
        try:
            recent = time.time() - (self.logs / REQUEST).stat().st_mtime < self.period
        except OSError:
            recent = False
        if not recent:
            (self.logs / REQUEST).touch()


def last_collective() -> tuple[int, str]:
    """How many collectives this process has begun, and the last one in words, from torch's flight recorder; (0, "") without a group."""
    if not torch.distributed.is_initialized():
        return 0, ""
    try:
        dump = torch._C._distributed_c10d._dump_fr_trace(includeCollectives=True, includeStackTraces=False, onlyActive=False)
        entry = max(pickle.loads(dump)["entries"], key=lambda entry: entry["record_id"])
    except (AttributeError, TypeError, KeyError, ValueError):  # no recorder in this build, or nothing in it
        return 0, ""
    return entry["record_id"] + 1, f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {entry['process_group'][0]}"


def end_now() -> None:
    """End this process as failed, whatever its other threads hang in."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_FAILED)
