"""One training at a time writes into a run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fusiontrain.parallel.reduce import on_main
from fusiontrain.utils.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def only_training_in(folder: Path) -> Iterator[None]:
    """Hold the run folder while the context is open, on the main rank for all. The system lets go of it when the process ends, however it ends.

    All ranks enter together. Raises UserError on all of them where another training holds it, such as ranks whose launcher was killed.
    """
    lock = FileLock(folder / LOCK)

    def acquire() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{folder}: another training is writing there; wait for its end, stop it, or set another run.dir") from error
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); set run.dir to a folder that can") from error

    on_main(acquire)
    try:
        yield
    finally:
        lock.release()
