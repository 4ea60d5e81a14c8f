"""The plan carried out: read, decode, collate, a few steps ahead of the trainer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from fusiontrain.config.schema import Config
from fusiontrain.data.collate import collate
from fusiontrain.data.documents import build_document
from fusiontrain.data.errors import BadSample, BadSampleLog
from fusiontrain.data.formats.pieces import Piece, Sample
from fusiontrain.data.index import IMAGE_PIECE, IndexedSource, member_reader
from fusiontrain.data.index_cache import index_sources
from fusiontrain.data.plan import Anchor, Plan, PlannedDocument, PlannedSequence, check_world_size
from fusiontrain.data.plan_fields import fingerprint, plan_fields
from fusiontrain.data.shards import OpenShards
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.types import Batch, Document, PackedSequence
from fusiontrain.utils.errors import UserError


@dataclass(frozen=True)
class LoaderState:
    """Where the data stand after `step` steps, and which data they are: the same on every rank.

    window, sequence: the plan's anchor, so that a resumed run need not plan from the start. epoch: of the first source, to look at.
    data_step: the step of the data after the last one that was used; other than `step` only after a jump by `data.from_step`.
    """

    step: int
    epoch: int
    fields: dict[str, str]
    window: int = 0
    sequence: int = 0
    data_step: int = 0

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
        # The first rank names and counts what indexing found; all judge it, so that all stop together.
        bad_in_index = self._judge_index(quietly=rank > 0)
        self._bad_in_index = bad_in_index if rank == 0 else 0
        self._shards = OpenShards()
        self._pools: list[ThreadPoolExecutor] = []

    @property
    def skipped(self) -> int:
        return self._bad_in_index + self.log.bad

    def iterate(self, start: int | LoaderState) -> Iterator[tuple[tuple[Batch, ...], LoaderState]]:
        """This rank's micro-batches of the steps from `start` on, and the state after each.

        start: a step, or the state after the last step that was used; from a state even a late step is found at once.
        `data.num_workers` threads build up to `data.prefetch_batches` steps ahead, in order. A sample that turns out bad leaves padding in
        its place. Raises UserError when too many are.
        """
        if isinstance(start, LoaderState):
            if start.step and start.data_step != self.plan.data_step(start.step - 1) + 1:
                raise UserError(
                    f"data.from_step: step {start.step} was reached with data step {start.data_step - 1}, but this gives "
                    f"{self.plan.data_step(start.step - 1)}; keep the entries that the run has passed and add later ones"
                )
            self.plan.begin_at(Anchor(start.window, start.sequence))
            start = start.step
        build_all = self._build_in_turn if self.config.data.num_workers == 0 else self._build_ahead
        for step, batches in enumerate(build_all(start), start + 1):
            yield batches, self._state(step)

    def close(self) -> None:
        """Stop the threads and close the shards. Open iterators are over; the loader may be iterated anew."""
        while self._pools:
            self._pools.pop().shutdown(wait=True, cancel_futures=True)
        self._shards.close()

    def _build_in_turn(self, step: int) -> Iterator[tuple[Batch, ...]]:
        while (batches := self._build(step)) is not None:
            yield batches
            step += 1

    def _build_ahead(self, step: int) -> Iterator[tuple[Batch, ...]]:
        """The same steps in the same order, built by threads while the trainer is at work. An error in a thread is raised here."""
        data = self.config.data
        pool = ThreadPoolExecutor(data.num_workers, thread_name_prefix="loader")
        self._pools.append(pool)
        try:
            waiting: deque[Future[tuple[Batch, ...] | None]] = deque(pool.submit(self._build, step + ahead) for ahead in range(data.prefetch_batches))
            step += data.prefetch_batches
            while (batches := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(self._build, step))
                step += 1
                yield batches
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if pool in self._pools:
                self._pools.remove(pool)

    def _state(self, step: int) -> LoaderState:
        # Not the data step of the next step: after a jump that one may not have been planned yet, so ranks would differ.
        data_step = self.plan.data_step(step - 1) + 1
        anchor = self.plan.anchor(data_step)
        return LoaderState(step, self.plan.epoch(anchor), self.fields, anchor.window, anchor.sequence, data_step)

    def _judge_index(self, quietly: bool) -> int:
        """The number of samples that indexing found unusable. Raises UserError when they are too many."""
        log = BadSampleLog(self.config.data.max_bad_fraction)
        log.good(sum(len(source) for source in self.sources))
        for source in self.sources:
            for ref, reason in source.bad():
                log.add(ref, reason, quietly)
        return log.bad

    def _build(self, step: int) -> tuple[Batch, ...] | None:
        data_step = self.plan.data_step(step)
        if not self.plan.training and not self.plan.step(data_step):
            return None
        share = self.plan.share(data_step, self.rank, self.world_size)
        sequences = [self._read(sequence, step + 1 if self.plan.training else 0) for sequence in share]
        size = self.config.train.micro_batch_sequences or len(sequences)
        return tuple(collate(sequences[first : first + size], self.config.data) for first in range(0, len(sequences), size))

    def _read(self, sequence: PlannedSequence, step: int = 0) -> PackedSequence:
        documents = (self._document(document, step) for document in sequence.documents)
        kept = tuple(document for document in documents if document is not None)
        return PackedSequence(kept, self.config.data.sequence_length, sequence.noise_key)

    def _document(self, planned: PlannedDocument, step: int) -> Document | None:
        source = self.sources[planned.source]
        shard, row = source.locate(planned.sample)
        ref = source.ref(planned.sample)
        members = source.indexes[shard].members(row)
        try:
            sample = self._sample(source, shard, row, list(members))  # first: it may close the shard's file
            read = member_reader(members, self._shards.file(source.shards[shard]))
            document = build_document(sample, read, planned.places, planned.cut, self.config.data, self.tokenizer, ref)
        except BadSample as error:
            self.log.add(ref, error, step=step, offset=min(member.offset for member in members.values()))
            return None
        self.log.good()
        return document

    def _sample(self, source: IndexedSource, shard: int, row: int, suffixes: list[str]) -> Sample:
        """The sample's pieces from the index and the token cache: neither its json nor its text is read again."""
        index, tokens = source.indexes[shard], source.tokens[shard]
        pieces = index.pieces(row)
        ids = tokens.read(self._shards.file(tokens.path), row).tolist()
        found, first = [], 0
        for kind, count, member in zip(index.kinds[pieces].tolist(), tokens.counts[pieces].tolist(), index.image_members[pieces].tolist(), strict=True):
            if kind == IMAGE_PIECE:
                found.append(Piece(image=suffixes[member]))
            else:
                found.append(Piece(token_ids=ids[first : first + count]))
                first += count
        return Sample(tuple(found), bool(index.is_pair[row]))
