"""The plan carried out: read, decode, collate, a few steps ahead of the trainer."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusiontrain.config.schema import Config
from fusiontrain.data.collate import collate
from fusiontrain.data.documents import build_document
from fusiontrain.data.errors import BadSample, BadSampleLog
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.index import index_sources, member_reader
from fusiontrain.data.plan import Plan, PlannedDocument, PlannedSequence, check_world_size, fingerprint, plan_fields
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.types import Batch, Document, PackedSequence
from fusiontrain.utils.errors import UserError


@dataclass(frozen=True)
class LoaderState:
    """Where the data stand after `step` steps, and which data they are: the same on every rank."""

    step: int
    epoch: int
    fields: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoaderState:
        return cls(**values)


class Loader:
    """The batches of one rank. split: "train" (endless) or "validation" (each document once).

    `fields` names what the order depends on and `fingerprint` is their hash; `skipped` counts bad samples met so far by this rank.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, split: str, rank: int, world_size: int) -> None:
        self.config, self.tokenizer, self.rank, self.world_size = config, tokenizer, rank, world_size
        check_world_size(config.train.global_batch_sequences, world_size)
        training = split == "train"
        self.sources = index_sources(config.data.sources if training else config.data.validation_sources, config.data, tokenizer)
        self.plan = Plan(config, self.sources, tokenizer, training)
        self.fields = plan_fields(config, self.sources, tokenizer)
        self.fingerprint = fingerprint(self.fields)
        self.log = BadSampleLog(config.data.max_bad_fraction)
        self._report_index()
        self._files: dict[Path, int] = {}

    @property
    def skipped(self) -> int:
        return self.log.bad

    def iterate(self, start_step: int) -> Iterator[tuple[tuple[Batch, ...], LoaderState]]:
        """This rank's micro-batches of step `start_step`, `start_step + 1`, ... and the state after each.

        `data.num_workers` threads build up to `data.prefetch_batches` steps ahead, in order. A sample that turns out bad leaves padding in
        its place. Raises UserError when too many are.
        """
        data = self.config.data
        if data.num_workers == 0:
            step = start_step
            while (batches := self._build(step)) is not None:
                yield batches, self._state(step + 1)
                step += 1
            return
        with ThreadPoolExecutor(data.num_workers, thread_name_prefix="loader") as pool:
            waiting: deque[Future[tuple[Batch, ...] | None]] = deque()
            try:
                step, submitted = start_step, start_step
                while True:
                    while len(waiting) < data.prefetch_batches:
                        waiting.append(pool.submit(self._build, submitted))
                        submitted += 1
                    batches = waiting.popleft().result()
                    if batches is None:
                        return
                    yield batches, self._state(step + 1)
                    step += 1
            finally:
                for future in waiting:
                    future.cancel()

    def close(self) -> None:
        """Close the shards. The loader may be used again; it opens them anew."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _state(self, step: int) -> LoaderState:
        return LoaderState(step, self.plan.epoch(step - 1), self.fields)

    def _report_index(self) -> None:
        """Samples that indexing found unusable are named and counted once, on the first rank."""
        if self.rank == 0:
            self.log.good(sum(len(source) for source in self.sources))
            for source in self.sources:
                for ref, reason in source.bad():
                    self.log.add(ref, reason)

    def _build(self, step: int) -> tuple[Batch, ...] | None:
        if not self.plan.training and not self.plan.step(step):
            return None
        sequences = [self._read(sequence) for sequence in self.plan.share(step, self.rank, self.world_size)]
        size = self.config.train.micro_batch_sequences or len(sequences)
        return tuple(collate(sequences[first : first + size], self.config.data) for first in range(0, len(sequences), size))

    def _read(self, sequence: PlannedSequence) -> PackedSequence:
        documents = (self._document(document) for document in sequence.documents)
        kept = tuple(document for document in documents if document is not None)
        return PackedSequence(kept, self.config.data.sequence_length, sequence.noise_key)

    def _document(self, planned: PlannedDocument) -> Document | None:
        source = self.sources[planned.source]
        shard, row = source.locate(planned.sample)
        ref = source.ref(planned.sample)
        try:
            members = source.indexes[shard].members(row)
            read = member_reader(members, self._open(source.shards[shard]))
            sample = read_sample(source.config.format, members, read, self.config.data.image.representation == "latents")
            document = build_document(sample, read, planned.places, self.config.data, self.tokenizer, ref)
        except BadSample as error:
            self.log.add(ref, error)
            return None
        self.log.good()
        return document

    def _open(self, shard: Path) -> int:
        if shard not in self._files:
            try:
                descriptor = os.open(shard, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{shard}: cannot be opened ({error.strerror}); it was there when the run began") from error
            if self._files.setdefault(shard, descriptor) != descriptor:  # another thread was faster
                os.close(descriptor)
        return self._files[shard]
