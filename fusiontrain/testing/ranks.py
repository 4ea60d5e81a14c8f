"""A pool of processes that tests run distributed code in. Starting processes costs seconds, so a test session shares one pool.

    losses = shared_pool().run(train_two_steps, 2, config)     # train_two_steps(config) on 2 ranks, results in order of rank

Every run gets a fresh gloo group over the first ranks of the pool: a collective that failed in one test leaves nothing behind for the next.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DEFAULT_TIMEOUT_SECONDS = 60.0
START_TIMEOUT_SECONDS = 120.0
SHUTDOWN_SECONDS = 5.0

Answer = tuple[bool, str, bytes | None, float]
"""Of one rank: succeeded, traceback, pickled result or exception, and when."""


class RankFailure(Exception):
    """A rank raised (its traceback is in the message, the exception is the cause where it could be pickled), died, or took too long."""


class RankPool:
    """Processes that wait for functions to run. They start when a run first needs them."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="fusiontrain-ranks-"))
        self._runs = 0

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        group: bool = True,
    ) -> list[Any]:
        """`function(*args)` on `world_size` ranks, in a process group of them if `group` -> results in order of rank.

        function: of a module's top level; args and results: picklable. A rank finds RANK, WORLD_SIZE and so on in its environment.
        Raises RankFailure for the first rank that failed. The ranks of a group that failed, or did not answer after
        `timeout_seconds`, are killed, and the next run starts new ones.
        """
        self._start(world_size)
        self._runs += 1
        store = str(self._folder / f"store-{self._runs}") if group else None
        job = pickle.dumps((args, world_size, store, timeout_seconds))
        for _, connection in self._ranks[:world_size]:
            connection.send((inspect.getfile(function), function.__module__, function.__qualname__, job))
        answers = self._collect(world_size, timeout_seconds, function.__qualname__)
        failures = [(rank, answer) for rank, answer in enumerate(answers) if not answer[0]]
        if failures:
            if group:  # what is left of connections that broke keeps later groups of the same processes from meeting
                self._stop(patience=0)
            # The rank that broke first is the cause; the others only lost their peer.
            rank, (_, text, pickled, _) = min(failures, key=lambda failure: failure[1][3])
            raise RankFailure(f"{function.__qualname__}, rank {rank} of {world_size}:\n{text}") from _unpickled(pickled)
        return [pickle.loads(answer[2]) for answer in answers]

    def close(self) -> None:
        """End the processes and delete the pool's files."""
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        new = []
        for _ in range(len(self._ranks), world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(len(self._ranks), theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
            new.append(ours)
        for connection in new:
            if not connection.poll(START_TIMEOUT_SECONDS):
                self._stop()
                raise RankFailure(f"a rank did not start within {START_TIMEOUT_SECONDS:.0f} s")
            connection.recv()

    def _collect(self, world_size: int, timeout_seconds: float, name: str) -> list[Any]:
        deadline = time.monotonic() + timeout_seconds
        answers = []
        for rank, (process, connection) in enumerate(self._ranks[:world_size]):
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    self._stop(patience=0)
                    raise RankFailure(f"{name}: rank {rank} did not answer within {timeout_seconds:.0f} s")
                answers.append(connection.recv())
            except (EOFError, ConnectionResetError) as error:
                process.join(SHUTDOWN_SECONDS)
                code = process.exitcode
                self._stop(patience=0)
                raise RankFailure(f"{name}: rank {rank} died with exit code {code}") from error
        return answers

    def _stop(self, patience: float = SHUTDOWN_SECONDS) -> None:
        for _, connection in self._ranks:
            connection.close()  # a waiting rank reads the end of its pipe and leaves
        for process, _ in self._ranks:
            process.join(patience)
            if process.is_alive():
                process.kill()
                process.join()
        self._ranks = []


@functools.cache
def shared_pool() -> RankPool:
    """The pool of this test session, ended with it."""
    pool = RankPool()
    atexit.register(pool.close)
    return pool


def _serve(rank: int, connection: Connection) -> None:
    """What a rank's process does: run what it is sent, send back its answer."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    connection.send("ready")
    with contextlib.suppress(EOFError, KeyboardInterrupt, ConnectionResetError):
        while True:
            file, module, name, job = connection.recv()
            answer = _run_job(rank, file, module, name, job)
            connection.send(answer)


def _run_job(rank: int, file: str, module: str, name: str, job: bytes) -> Answer:
    import torch.distributed as dist

    try:
        function = functools.reduce(getattr, name.split("."), _load_module(file, module))
        args, world_size, store, timeout_seconds = pickle.loads(job)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({key: str(value) for key, value in numbers.items()})
        if store is not None:
            # Shorter than the whole run, so that a rank that waits in vain can still say where.
            limit = timedelta(seconds=max(1.0, timeout_seconds * 0.8))
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
        result = function(*args)
        if store is not None:
            dist.barrier()
        return True, "", pickle.dumps(result), time.time()
    except BaseException as error:  # whatever a test raises belongs to the test
        return False, traceback.format_exc(), _pickled(error), time.time()
    finally:  # after the time was taken: it breaks the connections on which the other ranks wait, and they fail too
        if dist.is_initialized():
            dist.destroy_process_group()


def _load_module(file: str, name: str) -> Any:
    """A module of the package by name; a test file, which no import path leads to, from where it lies."""
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == file:
        return sys.modules[name]
    if name.partition(".")[0] == "fusiontrain":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _pickled(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:  # any exception class may define a pickling that fails
        return None


def _unpickled(data: bytes | None) -> BaseException | None:
    return None if data is None else pickle.loads(data)
