"""What a worker process does: it is sent planned sequences, builds them into shared memory, and says where the arrays lie.

`python -m fusiontrain.data.execute.worker DESCRIPTOR`, started by `processes.py` alone. It ends when its socket does, so it cannot outlive the
trainer, whatever ended that.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import numpy as np

from fusiontrain.data.arena import Arena
from fusiontrain.data.execute.build import Builder
from fusiontrain.data.execute.job import DropRing, Failure, Job, MapRing, Task, index_digest, packed
from fusiontrain.data.index.cache import index_sources
from fusiontrain.utils.errors import UserError

LOOK_FOR_PARENT_SECONDS = 5.0


class Worker:
    """Answers the messages of one trainer, one after the other."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.builders: dict[str, Builder] = {}
        self.rings: dict[int, np.ndarray] = {}

    def serve(self) -> None:
        """Answer until the trainer closes the socket or is gone."""
        trainer = os.getppid()
        try:
            while True:
                # A process that the trainer forked may hold its end of the socket open when the trainer is long gone.
                while not self.connection.poll(LOOK_FOR_PARENT_SECONDS):
                    if os.getppid() != trainer:
                        return
                self.connection.send(self._answer(self.connection.recv()))
        except (EOFError, ConnectionError):
            return

    def _answer(self, message: Any) -> Any:
        try:
            match message:
                case Task():
                    arena = Arena(self.rings[message.ring][message.offset : message.offset + message.nbytes])
                    return packed(self.builders[message.job].build(message.sequences, arena.allocate), arena)
                case Job():
                    self.builders[message.name] = _open(message)
                case MapRing():
                    self.rings[message.ring] = self._map(message.nbytes)
                case DropRing():
                    del self.rings[message.ring]
            return None
        except UserError as error:
            return Failure(str(error), by_user=True)
        except Exception:  # whatever it is, the trainer is to know
            return Failure(traceback.format_exc(), by_user=False)

    def _map(self, nbytes: int) -> np.ndarray:
        descriptor = recv_handle(self.connection)
        try:
            return np.frombuffer(mmap.mmap(descriptor, nbytes), np.uint8)
        finally:
            os.close(descriptor)


def _open(job: Job) -> Builder:
    sources = index_sources(job.sources, job.data, job.tokenizer)
    if index_digest(sources) != job.index:
        raise UserError("data.sources: the shards, or what is excluded of them, have changed since the run began; start it again")
    return Builder(sources, job.data, job.tokenizer, job.frozen_prefix)


def main() -> None:
    """Serve the trainer whose socket the first argument names."""
    # Who stops the trainer, from a keyboard or through Slurm, stops its workers too, but the step that it is at needs them to its end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    Worker(Connection(int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
