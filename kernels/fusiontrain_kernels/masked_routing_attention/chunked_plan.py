"""How the chunked attention cuts its work: which queries go together, and which keys any of them sees."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from fusiontrain_kernels.masked_routing_attention.kept import Kept

CHUNK_ROWS = 64
"""Queries per chunk. On one CPU core 64 beats 32 (overhead of calls) and 128 (keys that few of the queries see)."""
KEPT_SCORES = 1 << 23
"""Pairs of query and key whose masks are kept from layer to layer, 4 bytes each. Making them takes a tenth of the attention of a small model; a batch
with more pairs than these has its masks made again in every layer, so that no memory grows with the square of its rows."""

Span = tuple[int, int]
"""Rows from the first number to before the second."""


class Chunk(NamedTuple):
    """Its queries; the keys that any of them sees, in ascending order without overlaps; whether all of them see all of those, and any sees none."""

    rows: Span
    keys: list[Span]
    all_seen: bool
    has_blind: bool

    @property
    def num_scores(self) -> int:
        """Pairs of a query and a key."""
        return (self.rows[1] - self.rows[0]) * sum(high - low for low, high in self.keys)

    def wants_gradient(self, intervals: list[list[int]] | None) -> bool:
        """Whether any of its rows is in `intervals`; without them, always."""
        return intervals is None or any(first < end and begin < last for first, last in (self.rows, *self.keys) for begin, end in intervals)


def make_plan(key_ranges: torch.Tensor) -> list[Chunk]:
    """The chunks of [T, G, 2] in ascending order of rows. Reads `key_ranges` on the host, which on a GPU waits for the device."""
    key_ranges = key_ranges.clamp(0, len(key_ranges))
    num_rows = _chunk_sizes(key_ranges)
    empty = key_ranges[..., :1] >= key_ranges[..., 1:]
    limits = torch.iinfo(key_ranges.dtype)
    ranges = torch.where(empty, key_ranges.new_tensor([limits.max, limits.min]), key_ranges)  # [T, G, 2]
    chunk_of_row = torch.repeat_interleave(torch.tensor(num_rows, device=ranges.device))[:, None, None].expand_as(ranges)
    extremes = ranges.new_zeros(2, len(num_rows), *ranges.shape[1:])
    extremes[0].scatter_reduce_(0, chunk_of_row, ranges, "amin", include_self=False)
    extremes[1].scatter_reduce_(0, chunk_of_row, ranges, "amax", include_self=False)
    smallest, largest = extremes.tolist()
    blind = empty.flatten(1).all(1).tolist()  # of every row
    starts = itertools.accumulate(num_rows, initial=0)
    chunks = []
    for start, count, low, high in zip(starts, num_rows, smallest, largest, strict=False):
        keys = _union((low[g][0], high[g][1]) for g in range(len(low)) if low[g][0] < high[g][1])
        chunks.append(Chunk((start, start + count), keys, all_seen=low == high, has_blind=any(blind[start : start + count])))
    return chunks


def _union(spans: Iterable[Span]) -> list[Span]:
    """As few as hold the same rows, in ascending order: a key must not be taken twice."""
    found: list[Span] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def _chunk_sizes(key_ranges: torch.Tensor) -> list[int]:
    """CHUNK_ROWS each, but no chunk lies in two slices.

    So what other slices hold cannot change the order in which a row's sum is taken, nor its last bit; and images that are multiples of a
    chunk need no masks. The slice of a row is the one in which it sees itself.
    """
    rows = torch.arange(len(key_ranges), device=key_ranges.device)[:, None]
    sees_itself = (key_ranges[..., 0] <= rows) & (rows < key_ranges[..., 1])  # [T, G]
    changes = (sees_itself[1:] != sees_itself[:-1]).any(dim=1).nonzero().squeeze(1) + 1
    borders = [0, *changes.tolist(), len(key_ranges)]
    return [min(CHUNK_ROWS, end - first) for start, end in itertools.pairwise(borders) for first in range(start, end, CHUNK_ROWS)]


def bias_of(chunk: Chunk, key_ranges: torch.Tensor) -> torch.Tensor | None:
    """What to add to a chunk's scores, [n, m] float32: 0 where the query sees the key, else -inf; nothing where all see all."""
    if chunk.all_seen or not chunk.keys:
        return None
    intervals = key_ranges[slice(*chunk.rows)].unbind(1)  # G of [n, 2]
    columns = torch.cat([torch.arange(*span, dtype=key_ranges.dtype, device=key_ranges.device) for span in chunk.keys])
    seen = torch.zeros(len(intervals[0]), len(columns), dtype=torch.bool, device=columns.device)
    for low, high in (interval.split(1, dim=1) for interval in intervals):
        seen |= (columns >= low) & (columns < high)
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def make_biases(key_ranges: torch.Tensor) -> list[torch.Tensor | None] | None:
    """`bias_of` every chunk, if they are small: None where together they would have more than KEPT_SCORES numbers."""
    chunks = plan_of(key_ranges)
    if sum(chunk.num_scores for chunk in chunks if not chunk.all_seen) > KEPT_SCORES:
        return None
    return [bias_of(chunk, key_ranges) for chunk in chunks]


plan_of = Kept(make_plan)
biases_of = Kept(make_biases)
