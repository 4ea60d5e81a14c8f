"""An open shard: bytes by offset, wherever they lie."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from fusiontrain.data.storage import http, objects
from fusiontrain.data.storage.retry import CHANGED, FinalError, retried
from fusiontrain.data.storage.shard import RemoteShard

READ_AHEAD_BLOCK = {False: 1 << 18, True: 8 << 20}
"""Bytes that a walk reads at once, of a near and of a far file."""

READ_AHEAD_BLOCKS = 4
NOTHING = memoryview(b"")


class ShardFile(Protocol):
    """size: bytes. far: each read is a request over a network, so a few large ones are better than many small ones."""

    size: int
    far: bool

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises OSError where the file is shorter or a disk fails; UserError, with shard and offset, where a store does."""

    def close(self) -> None: ...


class LocalFile:
    """A file on a disk of this machine. Any number of threads may read it at once."""

    far = False

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        return read_exactly(self._descriptor, offset, size)

    def fill(self, buffer: memoryview, offset: int) -> None:
        """As `read`, of as many bytes as the buffer has, into it."""
        _require_all(os.preadv(self._descriptor, [buffer], offset), len(buffer), offset)

    def close(self) -> None:
        os.close(self._descriptor)


class RemoteFile:
    """A file behind a URL, read by ranges. It holds no connection of its own, so any number of threads may read it at once."""

    far = True

    def __init__(self, shard: RemoteShard) -> None:
        self.shard, self.size = shard, shard.size

    def read(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise OSError(f"{max(0, self.size - offset)} bytes instead of {size} at offset {offset}")
        return retried(lambda: self._read(offset, size), f"{self.shard}: {size} bytes at offset {offset}", self.shard.settings) if size else b""

    def close(self) -> None:
        pass

    def _read(self, offset: int, size: int) -> bytes:
        shard, timeout = self.shard, self.shard.settings.timeout_seconds
        if not is_http(shard.url):
            return objects.read_range(shard.url, offset, size, timeout, shard.tag)
        data, total, tag = http.read_range(shard.url, offset, size, timeout)
        if total not in (None, shard.size) or (tag and shard.tag and tag != shard.tag):
            raise FinalError(f"{CHANGED} (from {shard.size} bytes, tag {shard.tag}, to {total} bytes, tag {tag})")
        return data


class ReadAhead:
    """A file for a walk from front to back: it is read in large blocks, of which the last few are kept."""

    far = False

    def __init__(self, file: ShardFile) -> None:
        self.file, self.size = file, file.size
        self._block_size = READ_AHEAD_BLOCK[file.far]
        self._blocks: OrderedDict[int, memoryview] = OrderedDict()
        self._start, self._latest = 0, NOTHING  # the block that was read from last, for most reads are of the same

    def read(self, offset: int, size: int) -> bytes:
        place = offset - self._start
        if 0 <= place <= len(self._latest) - size:
            return self._latest[place : place + size].tobytes()
        first, last = offset // self._block_size, (offset + size - 1) // self._block_size
        if offset + size > self.size or last - first >= READ_AHEAD_BLOCKS:
            return self.file.read(offset, size)
        parts = []
        for number in range(first, last + 1):
            self._start, self._latest = number * self._block_size, self._block(number)
            parts.append(self._latest[max(0, offset - self._start) : offset + size - self._start].tobytes())
        return b"".join(parts)

    def window(self, offset: int) -> memoryview:
        """What the block that holds the offset has from there on, until the next read; empty behind the end of the file."""
        number = offset // self._block_size
        if offset >= self.size:
            return NOTHING
        self._start, self._latest = number * self._block_size, self._block(number)
        return self._latest[offset - self._start :]

    def close(self) -> None:
        self.file.close()

    def _block(self, number: int) -> memoryview:
        if number not in self._blocks:
            self._latest = NOTHING  # its memory may be that of the block that goes
            oldest = self._blocks.popitem(last=False)[1] if len(self._blocks) == READ_AHEAD_BLOCKS else NOTHING
            start = number * self._block_size
            self._blocks[number] = self._read_block(start, min(self._block_size, self.size - start), oldest)
        return self._blocks[number]

    def _read_block(self, start: int, size: int, oldest: memoryview) -> memoryview:
        """Of a local file into the memory of the oldest block: to get pages from the system anew costs three times what reading into them does."""
        if not isinstance(self.file, LocalFile):
            return memoryview(self.file.read(start, size))
        buffer = oldest[:size] if len(oldest) >= size else memoryview(bytearray(size))
        self.file.fill(buffer, start)
        return buffer


class Stretch:
    """A part of a far file that is fetched whole at the first read in it: one request for a sample, not one for each member."""

    far = False

    def __init__(self, file: ShardFile, parts: Iterable[tuple[int, int]]) -> None:
        """parts: (offset, size) of what may be read."""
        places = [(offset, offset + size) for offset, size in parts]
        self.file, self.size = file, file.size
        self._first, self._end = min(first for first, _ in places), max(end for _, end in places)
        self._data: bytes | None = None

    def read(self, offset: int, size: int) -> bytes:
        if self._data is None:
            self._data = self.file.read(self._first, self._end - self._first)
        return self._data[offset - self._first : offset - self._first + size]

    def close(self) -> None:
        self.file.close()


class FileStream(io.RawIOBase):
    """A shard's file as a stream, for what reads one; `close` leaves the file open."""

    def __init__(self, file: ShardFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._position, min(len(buffer), self._file.size - self._position))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_exactly(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of an open file, without moving its position. Raises OSError when the file is shorter."""
    data = os.pread(descriptor, size, offset)
    _require_all(len(data), size, offset)
    return data


def _require_all(found: int, size: int, offset: int) -> None:
    if found != size:
        raise OSError(f"{found} bytes instead of {size} at offset {offset}")


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def describe(url: str, timeout: float) -> tuple[int, str]:
    """(size, tag) of the file behind a URL. Raises TransientError or FinalError."""
    return (http if is_http(url) else objects).describe(url, timeout)
