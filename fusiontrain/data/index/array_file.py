"""Named numpy arrays in one file: magic, length and CRC32 of a JSON header, the header, then the arrays on 64-byte borders.

The file is mapped, not read: processes share its pages, and only those that somebody looks at take memory. So a start compares the header's
checksum, and only `data verify`, which reads everything, those of the arrays.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal.isal_zlib import crc32

PREAMBLE = struct.Struct("<8sQI")
"""Magic, bytes of the header, its CRC32."""
MAGIC = b"FTARRAY3"
ALIGNMENT = 64


@dataclass(frozen=True)
class ArrayFile:
    """A file's arrays by name (read-only views of the mapped file), where each begins in bytes, and what was written about them."""

    arrays: dict[str, np.ndarray]
    offsets: dict[str, int]
    about: dict[str, Any]


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write 1-d arrays, and `about` as JSON, so that `path` is complete or not there, whoever else writes it at the same time. Raises OSError."""
    position, entries, checksum = 0, {}, 0
    for name, array in arrays.items():
        entries[name] = [array.dtype.str, len(array), position]
        position += _aligned(array.nbytes)
        checksum = crc32(_padded(array), checksum)
    header = json.dumps({"arrays": entries, "nbytes": position, "crc32": checksum, "about": about}).encode()
    header = header.ljust(_aligned(PREAMBLE.size + len(header)) - PREAMBLE.size)

    def parts() -> Iterator[bytes]:
        yield PREAMBLE.pack(MAGIC, len(header), crc32(header)) + header
        yield from map(_padded, arrays.values())

    write_whole(path, parts())


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that it is complete or not there, whoever else writes it at the same time. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has, on no other machine that shares the disk either: process numbers repeat between containers.
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def map_arrays(path: Path) -> ArrayFile | None:
    """The file, mapped; None where there is no such file, or one that a full disk or a crash left damaged."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        first = size - header["nbytes"]
        arrays = {name: np.frombuffer(mapped, dtype, count, first + offset) for name, (dtype, count, offset) in header["arrays"].items()}
        offsets = {name: first + offset for name, (_, _, offset) in header["arrays"].items()}
        mapped.madvise(mmap.MADV_RANDOM)  # a document's numbers lie in few pages: do not read those around them
        return ArrayFile(arrays, offsets, header["about"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_about(path: Path) -> dict[str, Any] | None:
    """What was written about the arrays, without mapping them; None as for `map_arrays`."""
    try:
        with path.open("rb") as file:
            return _read_header(file, os.fstat(file.fileno()).st_size)["about"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_as_written(path: Path) -> bool:
    """Whether every byte is as it was written, which takes reading them all."""
    try:
        with path.open("rb") as file:
            expected, found = _read_header(file, os.fstat(file.fileno()).st_size)["crc32"], 0
            while part := file.read(1 << 20):
                found = crc32(part, found)
            return found == expected
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    """Raises ValueError unless the file of that size is whole, as far as the header tells."""
    start = file.read(PREAMBLE.size)
    magic, length, checksum = PREAMBLE.unpack(start) if len(start) == PREAMBLE.size else (b"", 0, 0)
    if magic != MAGIC or length > size:
        raise ValueError("not a file of arrays")
    text = file.read(length)
    if crc32(text) != checksum:
        raise ValueError("its header is damaged")
    header = json.loads(text)
    if size != len(start) + length + header["nbytes"]:
        raise ValueError("cut short")
    return header


def _padded(array: np.ndarray) -> bytes:
    return array.tobytes().ljust(_aligned(array.nbytes), b"\0")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
