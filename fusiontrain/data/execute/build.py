"""Planned sequences carried out: read, checked, decoded, and laid out as the arrays of a micro-batch.

No torch, and no state but open files: threads share a builder, and every worker process has one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusiontrain.config.schema import DataConfig
from fusiontrain.data.arena import Allocate
from fusiontrain.data.batch_arrays import BatchArrays, batch_arrays
from fusiontrain.data.documents import build_document
from fusiontrain.data.errors import BadSample
from fusiontrain.data.execute.chunks import Chunks
from fusiontrain.data.formats.pieces import Piece, Sample
from fusiontrain.data.index.shard_index import TEXT_PIECE, IndexedSource, member_reader
from fusiontrain.data.plan.plan import PlannedDocument, PlannedSequence
from fusiontrain.data.shards import OpenShards
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.types import Document, PackedSequence, SourceRef


@dataclass(frozen=True)
class BadDocument:
    """A planned document that left padding in its place. offset: of its sample's first member in the shard, in bytes."""

    ref: SourceRef
    error: BadSample
    offset: int


@dataclass(frozen=True)
class Built:
    """A micro-batch, and for each of its planned documents in order None or why it is not in there."""

    arrays: BatchArrays
    verdicts: tuple[BadDocument | None, ...]


class Builder:
    """Carries out plans of `sources`."""

    def __init__(self, sources: Sequence[IndexedSource], data: DataConfig, tokenizer: Tokenizer, frozen_prefix: bool = False) -> None:
        self.sources, self.data, self.tokenizer, self.frozen_prefix = sources, data, tokenizer, frozen_prefix
        self.shards = OpenShards()
        caches = data.num_workers if data.executor == "processes" else 1  # each process has its own
        self.chunks = Chunks(sources, data.chunk_cache_bytes // max(1, caches)) if data.io_mode == "lanes" else None

    def build(self, sequences: Sequence[PlannedSequence], allocate: Allocate = np.empty) -> Built:
        """One micro-batch, its arrays in memory from `allocate`. Raises UserError where a shard cannot be opened any more."""
        verdicts: list[BadDocument | None] = []
        packed = [self.read(sequence, verdicts) for sequence in sequences]
        return Built(batch_arrays(packed, self.data, allocate, self.frozen_prefix), tuple(verdicts))

    def read(self, sequence: PlannedSequence, verdicts: list[BadDocument | None]) -> PackedSequence:
        """The documents of a sequence that are sound; adds a verdict on each that was planned."""
        found = [self._document(document) for document in sequence.documents]
        verdicts += [document if isinstance(document, BadDocument) else None for document in found]
        kept = tuple(document for document in found if isinstance(document, Document))
        return PackedSequence(kept, self.data.sequence_length, sequence.noise_key)

    def close(self) -> None:
        """Close the shards; nobody may be building."""
        self.shards.close()
        if self.chunks is not None:
            self.chunks.clear()

    def _document(self, planned: PlannedDocument) -> Document | BadDocument:
        source = self.sources[planned.source]
        shard, row = source.locate(planned.sample)
        ref = source.ref(planned.sample)
        members = source.indexes[shard].members(row)
        try:
            sample = self._sample(source, shard, row, list(members))  # first: it may close the shard's file
            file = self.shards.file(source.shards[shard])
            if self.chunks is not None and file.far:
                file = self.chunks.file(planned.source, planned.sample, shard, file)
            read = member_reader(members, file)
            return build_document(sample, read, planned.places, planned.cut, self.data, self.tokenizer, ref)
        except BadSample as error:
            # Without its traceback, whose frames would hold the memory that the batch is built in, until a garbage collection.
            return BadDocument(ref, BadSample(str(error), error.reason), min(member.offset for member in members.values()))

    def _sample(self, source: IndexedSource, shard: int, row: int, suffixes: list[str]) -> Sample:
        """The sample's pieces from the index and the token cache: neither its json nor its text is read again."""
        index, tokens = source.indexes[shard], source.tokens[shard]
        pieces = index.pieces(row)
        ids = tokens.read(self.shards.file(tokens.path), row)
        found, first = [], 0
        for kind, count, member in zip(index.kinds[pieces].tolist(), tokens.counts[pieces].tolist(), index.image_members[pieces].tolist(), strict=True):
            if kind != TEXT_PIECE:
                found.append(Piece(image=suffixes[member]))
            else:
                found.append(Piece(token_ids=ids[first : first + count]))
                first += count
        return Sample(tuple(found), bool(index.is_pair[row]))
