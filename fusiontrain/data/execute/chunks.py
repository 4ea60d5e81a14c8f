"""Chunks of neighbours in shards behind a network, each fetched once and kept for the documents that come later: `data.io_mode: lanes`."""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fusiontrain.data.index.shard_index import IndexedSource
from fusiontrain.data.plan.permutation import CHUNK_DOCUMENTS
from fusiontrain.data.storage.files import ShardFile

logger = logging.getLogger(__name__)

MOST_GAP_BYTES = 1 << 18
"""Bytes that nobody wants (of samples left out) which are read along, for they cost less than a request more."""

MOST_RANGE_BYTES = 1 << 25
"""A request for more would run into the timeout where the network is slow."""

CACHED_RANGES = 4096
REMEMBERED = 64
"""Chunks that went, beside as many as are held: one that is wanted again while it is remembered went too early."""


class Chunks:
    """The chunks of `sources` that were fetched, at most `limit` bytes; those that were used longest ago go first. Any threads may ask."""

    def __init__(self, sources: Sequence[IndexedSource], limit: int) -> None:
        self._cache = ByteCache(limit)
        self._ranges = functools.lru_cache(CACHED_RANGES)(lambda number, shard, chunk: _chunk_ranges(sources[number], shard, chunk))

    def file(self, number: int, sample: int, shard: int, file: ShardFile) -> ShardFile:
        """The open file of a shard of source `number` as one that is read a chunk at a time; good for the members of that sample of it."""
        return _ChunkedFile(file, (number, shard), self._ranges(number, shard, sample // CHUNK_DOCUMENTS), self._cache)

    def clear(self) -> None:
        """Forget them all."""
        self._cache.clear()


class ByteCache:
    """Bytes by key, at most `limit` of them and always the last ones. Threads that want the same ones at once wait for one fetch."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held, self._has_warned = 0, False
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._gone: OrderedDict[Hashable, None] = OrderedDict()  # those that went last
        self._lock = threading.Lock()

    def get(self, key: Hashable, fetch: Callable[[], bytes]) -> bytes:
        """The bytes of the key, which `fetch` gives where they are not held. Its errors are those of whoever waited for it, one after another."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
        with entry.lock:
            if entry.data is None:
                entry.data = fetch()
                self._make_room(key, entry)
            return entry.data

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._held = 0

    def _make_room(self, key: Hashable, new: _Entry) -> None:
        with self._lock:
            if self._entries.get(key) is not new:
                return  # cleared in the meantime: whoever waits for it gets it, and it is not held
            self._held += len(new.data or b"")
            if key in self._gone and not self._has_warned:
                self._has_warned = True
                logger.warning("chunks are fetched again, for data.chunk_cache_bytes=%d does not hold them until they are used up; raise it", self.limit)
            for old_key, old in list(self._entries.items()):
                if self._held <= self.limit:
                    break
                if old is not new and old.data is not None:
                    del self._entries[old_key]
                    self._held -= len(old.data)
                    self._gone[old_key] = None
            while len(self._gone) > REMEMBERED + len(self._entries):
                self._gone.popitem(last=False)


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    data: bytes | None = None


class _ChunkedFile:
    """A file of which whole ranges are fetched and kept. Reads outside of them go to the file."""

    far = False

    def __init__(self, file: ShardFile, key: Hashable, ranges: Sequence[tuple[int, int]], cache: ByteCache) -> None:
        self.file, self.size = file, file.size
        self._key, self._all, self._cache = key, ranges, cache

    def read(self, offset: int, size: int) -> bytes:
        for first, end in self._all:
            if first <= offset and offset + size <= end:
                data = self._cache.get((self._key, first, end), functools.partial(self.file.read, first, end - first))
                return data[offset - first : offset - first + size]
        return self.file.read(offset, size)

    def close(self) -> None:
        self.file.close()


def joined(ranges: Sequence[tuple[int, int]], most_gap: int, most_bytes: int) -> list[tuple[int, int]]:
    """Ranges (first, end) that hold all the given ones, in rising order: neighbours become one unless the gap between them, or the whole, is too
    large."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and first - found[-1][1] <= most_gap and max(end, found[-1][1]) - found[-1][0] <= most_bytes:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return found


def _chunk_ranges(source: IndexedSource, shard: int, chunk: int) -> list[tuple[int, int]]:
    """The ranges of a shard to be fetched for its samples of a chunk."""
    index, begin = source.indexes[shard], source.starts[shard]
    samples = range(max(begin, chunk * CHUNK_DOCUMENTS), min(source.starts[shard + 1], (chunk + 1) * CHUNK_DOCUMENTS))
    rows = [source.locate(sample)[1] for sample in samples]
    members = np.concatenate([np.arange(index.member_start[row], index.member_start[row + 1]) for row in rows])
    offsets = index.offsets[members]
    return joined(list(zip(offsets.tolist(), (offsets + index.sizes[members]).tolist(), strict=True)), MOST_GAP_BYTES, MOST_RANGE_BYTES)
