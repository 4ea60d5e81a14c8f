"""Named numpy arrays in one file: a JSON header, then the arrays on 64-byte borders, so that a part can be read or mapped by its offset."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"FTARRAY1"
ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """Where an array lies in its file: dtype as numpy writes it, number of items, offset in bytes."""

    dtype: str
    length: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.length * np.dtype(self.dtype).itemsize


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write 1-d arrays so that `path` is complete or not there, whoever else writes it at the same time. Raises OSError."""
    position, entries = 0, {}
    for name, array in arrays.items():
        entries[name] = [array.dtype.str, len(array), position]
        position += _aligned(array.nbytes)
    header = json.dumps({"arrays": entries, "nbytes": position}).encode()
    start = _aligned(len(MAGIC) + 8 + len(header))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has, on no other machine that shares the disk either: process numbers repeat between containers.
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write((MAGIC + len(header).to_bytes(8, "little") + header).ljust(start, b"\0"))
            for array in arrays.values():
                file.write(array.tobytes().ljust(_aligned(array.nbytes), b"\0"))
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def read_entries(path: Path) -> dict[str, Entry] | None:
    """The file's arrays by name; None where there is no such file, or one that a full disk or a crash left damaged."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC) + 8)
            if start[: len(MAGIC)] != MAGIC:
                return None
            length = int.from_bytes(start[len(MAGIC) :], "little")
            size = os.fstat(file.fileno()).st_size
            if length > size:
                return None
            header = json.loads(file.read(length))
            first = _aligned(len(start) + length)
            if size != first + header["nbytes"]:
                return None
            return {name: Entry(dtype, count, first + offset) for name, (dtype, count, offset) in header["arrays"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_arrays(path: Path, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """Those arrays of the file, in memory and read-only."""
    arrays = {}
    with path.open("rb") as file:
        for name, entry in entries.items():
            file.seek(entry.offset)
            arrays[name] = np.frombuffer(file.read(entry.nbytes), dtype=entry.dtype)
    return arrays


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
