"""What the ranks of a plan would read, from the plan alone: how many of them need a chunk of neighbours, and how much one has to hold."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusiontrain.data.index.shard_index import IndexedSource
from fusiontrain.data.plan.permutation import CHUNK_DOCUMENTS

if TYPE_CHECKING:
    from fusiontrain.data.plan.plan import PlannedSequence

HEADER_BYTES = 512
"""Of a document's first member, which is read along with what is before it."""


class Reads:
    """Counts the chunks of `sources` that are read by each rank, once in an epoch."""

    def __init__(self, sources: Sequence[IndexedSource]) -> None:
        self.sources = sources
        # Of a chunk (source, epoch, number) by a rank: the first and the last step, and the bytes of those of its documents that were planned.
        self._spans: dict[tuple[tuple[int, int, int], int], list[int]] = {}

    def add(self, step: int, rank: int, share: Sequence[PlannedSequence]) -> None:
        """A rank's sequences of a step; steps rise."""
        for document in (document for sequence in share for document in sequence.documents):
            chunk = document.source, document.epoch, document.sample // CHUNK_DOCUMENTS
            span = self._spans.setdefault((chunk, rank), [step, step, 0])
            span[1] = step
            span[2] += self._bytes(document.source, document.sample)

    def ranks_per_chunk(self) -> float:
        """How many ranks need a chunk, on average: 1 is the least."""
        return len(self._spans) / max(1, len({chunk for chunk, _ in self._spans}))

    def most_bytes(self) -> int:
        """What the rank that has most to hold must hold of chunks from their first document to their last, in its worst step."""
        changes: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for (_, rank), (first, last, size) in self._spans.items():
            changes[rank][first] += size
            changes[rank][last + 1] -= size
        return max((max(itertools.accumulate(steps[step] for step in sorted(steps))) for steps in changes.values()), default=0)

    def _bytes(self, number: int, sample: int) -> int:
        source = self.sources[number]
        shard, row = source.locate(sample)
        index = source.indexes[shard]
        first, last = int(index.member_start[row]), int(index.member_start[row + 1]) - 1
        return HEADER_BYTES + int(index.offsets[last] + index.sizes[last] - index.offsets[first])
