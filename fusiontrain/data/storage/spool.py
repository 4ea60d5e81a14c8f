"""A folder of bounded size for shards that have to be decompressed or fetched whole, shared by all processes of a machine.

What was read longest ago goes first. A file is complete under its name or not there; a process that dies leaves a `.part` that the next one
that needs room removes. The size is bounded at every moment, for no reader keeps a file open between two reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fusiontrain.utils.errors import UserError


class Spool:
    """folder: made on first use, on a disk of this machine (its locks are flock). limit: bytes of all files in it, at least those of one shard."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def open(self, key: str, shown: str, content: Callable[[], Generator[bytes]]) -> tuple[int, bool]:
        """(descriptor of the file `key`, whether it had to be written). The caller closes it soon.

        shown: the shard, for errors. content: its bytes; called by one process at a time. Raises UserError where there is no room for it.
        """
        path = self.folder / f"{key}.tar"
        try:
            descriptor = _opened(path)
            if descriptor is not None:
                return descriptor, False
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._lock_of(path)):
                descriptor = _opened(path)
                if descriptor is not None:
                    return descriptor, False
                return self._write(path, shown, content), True
        except OSError as error:
            raise UserError(f"{shown}: cannot be kept in data.storage.cache_dir={self.folder} ({error.strerror or error}); free or name another") from error

    def _write(self, path: Path, shown: str, content: Callable[[], Generator[bytes]]) -> int:
        part = path.with_suffix(".part")
        room = FileLock(self.folder / "room.lock")
        try:
            with part.open("wb") as file, closing(content()) as chunks:
                for chunk in chunks:
                    with room:  # until the bytes are there, so that the next one counts them
                        self._make_room(part, shown, len(chunk))
                        file.write(chunk)
                        file.flush()
            descriptor = os.open(part, os.O_RDONLY)  # before it has a name under which another process may remove it
            part.replace(path)
            return descriptor
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _make_room(self, mine: Path, shown: str, wanted: int) -> None:
        """Remove files until `wanted` more bytes fit."""
        used, files = 0, []
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".part"):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    used += stat.st_size
                    files.append((path.suffix == ".tar", stat.st_mtime_ns, stat.st_size, path))
        for is_whole, _, size, path in sorted(files):
            if used + wanted <= self.limit:
                return
            if path != mine and (is_whole or self._is_abandoned(path)):
                path.unlink(missing_ok=True)
                used -= size
        if used + wanted > self.limit:
            others = "" if used == mine.stat().st_size else ", which other processes are filling at this moment"
            raise UserError(f"{shown}: does not fit into the {self.limit} bytes of {self.folder}{others}; raise data.storage.cache_bytes")

    def _is_abandoned(self, part: Path) -> bool:
        try:
            with FileLock(self._lock_of(part), timeout=0):
                return True
        except Timeout:
            return False

    def _lock_of(self, path: Path) -> Path:
        return path.with_suffix(".lock")


def _opened(path: Path) -> int | None:
    """The file's descriptor, after it was marked as read just now."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    os.utime(descriptor)
    return descriptor
