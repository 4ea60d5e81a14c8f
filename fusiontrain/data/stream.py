"""Training from a stream: shards that are read once, from front to back, with no index and so no plan; for pipes that cannot be indexed.

What webdataset gives, and no more: a step depends on the number of ranks, a resumed run reads its shards anew in another order, and a shard that
was cut between two of its members looks complete. Where shards can be indexed, `data.mode: planned` has none of these faults.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fusiontrain.config.schema import Config, SourceConfig, StorageConfig
from fusiontrain.config.validate import has_frozen_prefix
from fusiontrain.data.batch_arrays import most_bytes
from fusiontrain.data.collate import collate
from fusiontrain.data.documents import Arrangement, arrange, build_document, draw
from fusiontrain.data.errors import READ, BadSample, BadSampleLog
from fusiontrain.data.execute.ahead import steps_ahead
from fusiontrain.data.formats.pieces import Piece, Sample, is_speech, split_page
from fusiontrain.data.formats.read import read_sample, source_kind
from fusiontrain.data.index.shard_index import IMAGE_PIECE, TEXT_PIECE
from fusiontrain.data.loader import LoaderState
from fusiontrain.data.modalities.image import image_size
from fusiontrain.data.plan.fields import fingerprint
from fusiontrain.data.plan.lengths import patches
from fusiontrain.data.plan.packing import best_fit_decreasing
from fusiontrain.data.plan.permutation import feistel
from fusiontrain.data.plan.plan import check_world_size
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.storage.open import stream_of
from fusiontrain.data.storage.shard import Shard, shown_source
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.types import Batch, Document, PackedSequence, SourceRef
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import hash_key, keyed_uniform

logger = logging.getLogger(__name__)

_SHARDS_DRAW, _SHUFFLE_DRAW, _SOURCE_DRAW, _DOCUMENT_DRAW, _WINDOW_DRAW, _NOISE_DRAW = range(21, 27)

RawSample = dict[str, Any]
"""What webdataset makes of a sample: its members' bytes by suffix, and "__key__"."""


class Waiting(NamedTuple):
    """A document that is measured but not decoded yet. num_tokens is its length."""

    raw: RawSample
    sample: Sample
    arrangement: Arrangement
    source: SourceRef

    @property
    def num_tokens(self) -> int:
        return self.arrangement.num_tokens


class StreamLoader:
    """The batches of one rank, in place of `Loader` where `data.mode` is stream; endless. Each rank reads shards of its own in one thread.

    dropped: documents left out by `data.oversize: drop`. `log` and `skipped` count bad samples and shards whose reading ended early.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, rank: int, world_size: int) -> None:
        check_world_size(config, world_size)
        self.config, self.data, self.tokenizer, self.rank, self.world_size = config, config.data, tokenizer, rank, world_size
        self.shards = [_expand(source, self.data.storage) for source in self.data.sources]
        for source, shards in zip(self.data.sources, self.shards, strict=True):
            if len(shards) < world_size:
                raise UserError(f"{shown_source(source.path)}: {len(shards)} shards for {world_size} ranks; data.mode=stream needs one for each")
        self.fields = {
            "data.mode": "stream",
            "number of ranks (data.mode=stream is not elastic)": str(world_size),
            "seed": str(config.seed),
            "data.sources": repr([source.model_dump() | {"path": shown_source(source.path)} for source in self.data.sources]),
            "data.sequence_length": str(self.data.sequence_length),
            "data.tokenizer": tokenizer.fingerprint,
        }
        self.fingerprint = fingerprint(self.fields)
        self.log = BadSampleLog(self.data.max_bad_fraction)
        self.dropped = self._step = 0
        self._pools: list[ThreadPoolExecutor] = []
        if rank == 0:
            logger.warning("data.mode=stream: not elastic (the number of ranks is fixed); a resumed run reads its shards anew, in another order")

    @property
    def skipped(self) -> int:
        return self.log.bad

    def iterate(self, start: int | LoaderState) -> Iterator[tuple[tuple[Batch, ...], LoaderState]]:
        """This rank's micro-batches of the steps from `start` on. Another start is another order of everything. Raises UserError when too many
        samples are bad, and when a source has none at all."""
        step = start.step if isinstance(start, LoaderState) else start
        steps = self._steps(step)
        for number, batches in enumerate(self._ahead(steps) if self.data.num_workers else steps, step + 1):
            yield batches, LoaderState(number, 0, self.fields, data_step=number)

    def close(self) -> None:
        while self._pools:
            self._pools.pop().shutdown(wait=True, cancel_futures=True)

    def _ahead(self, steps: Iterator[tuple[Batch, ...]]) -> Iterator[tuple[Batch, ...]]:
        """The same, built by a thread some steps ahead, as `data.prefetch_bytes` allows."""
        share = self.config.train.global_batch_sequences // self.world_size
        depth = steps_ahead(self.data.prefetch_bytes, most_bytes(share, self.data, has_frozen_prefix(self.config)))
        pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._pools.append(pool)
        try:
            waiting: deque[Future[tuple[Batch, ...]]] = deque(pool.submit(next, steps) for _ in range(depth))
            while True:
                batches = waiting.popleft().result()
                waiting.append(pool.submit(next, steps))
                yield batches
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _steps(self, start: int) -> Iterator[tuple[Batch, ...]]:
        share = self.config.train.global_batch_sequences // self.world_size
        size = self.config.train.micro_batch_sequences or share
        groups = self._groups(start)
        for step in itertools.count(start):
            self._step = step + 1
            sequences = [self._sequence(next(groups), hash_key(self.config.seed, step, self.rank, place, _NOISE_DRAW)) for place in range(share)]
            yield tuple(collate(sequences[first : first + size], self.data, has_frozen_prefix(self.config)) for first in range(0, share, size))

    def _sequence(self, group: list[Waiting], noise_key: int) -> PackedSequence:
        built = [self._build(document) for document in group]
        return PackedSequence(tuple(document for document in built if document is not None), self.data.sequence_length, noise_key)

    def _build(self, waiting: Waiting) -> Document | None:
        """The document; None, so that its place is padding, where it turns out bad."""
        places, _, cut = waiting.arrangement
        try:
            document = build_document(waiting.sample, _reader(waiting.raw), places, cut, self.data, self.tokenizer, waiting.source)
        except BadSample as error:
            self.log.add(waiting.source, error, step=self._step)
            return None
        self.log.good()
        return document

    def _groups(self, start: int) -> Iterator[list[Waiting]]:
        """The documents of one sequence after another: packed a window at a time, in a drawn order."""
        documents = self._documents(start)
        for window in itertools.count():
            waiting = list(itertools.islice(documents, self.data.pack_window_documents))
            groups = best_fit_decreasing([document.num_tokens for document in waiting], self.data.sequence_length)
            self._rng(start, window, _WINDOW_DRAW).shuffle(groups)
            yield from ([waiting[place] for place in group] for group in groups)

    def _documents(self, start: int) -> Iterator[Waiting]:
        """Measured documents, of sources drawn by their weights."""
        streams = [self._samples(number, start) for number in range(len(self.shards))]
        bounds = list(itertools.accumulate(source.weight for source in self.data.sources))
        for number in itertools.count():
            place = keyed_uniform(self.config.seed, start, self.rank, number, _SOURCE_DRAW) * bounds[-1]
            source = min(bisect.bisect_right(bounds, place), len(bounds) - 1)
            url, raw = next(streams[source])
            config = self.data.sources[source]
            ref = SourceRef(shown_source(config.path), url, number, raw["__key__"])
            try:
                yield from self._measure(raw, config, ref, (self.config.seed, start, self.rank, number, _DOCUMENT_DRAW))
            except BadSample as error:
                self.log.add(ref, error, step=self._step)

    def _measure(self, raw: RawSample, source: SourceConfig, ref: SourceRef, key: tuple[int, ...]) -> list[Waiting]:
        read = _reader(raw)
        suffixes = [suffix for suffix in raw if not suffix.startswith("__")]
        sample = read_sample(source_kind(source), suffixes, read, self.data.image.representation)
        pieces, tokens = [], []
        for piece in sample.pieces:
            if piece.image is not None and is_speech(piece.image):
                continue
            if piece.image is not None:
                tokens.append(patches(*image_size(piece.image, read(piece.image)), self.data))
            else:
                piece = Piece(token_ids=self.tokenizer.encode(piece.text or ""))
                tokens.append(len(piece.token_ids or ()))
            pieces.append(piece)
        kinds = [TEXT_PIECE if piece.image is None else IMAGE_PIECE for piece in pieces]
        draws = draw(self.data, source, key, sample.is_pair, training=True)
        parts = arrange(kinds, tokens, sample.is_pair, draws, self.data, self.tokenizer.begin_text_id is not None)
        if self.data.oversize == "drop" and (not parts or parts[-1].cut):
            self.dropped += 1
            return []
        return [Waiting(raw, Sample(tuple(pieces), sample.is_pair), part, ref) for part in parts]

    def _samples(self, source: int, start: int) -> Iterator[tuple[str, RawSample]]:
        """(shard, sample) of this rank's shards of a source, for ever: other shards in each epoch, each by one rank, through a shuffle buffer."""
        from webdataset.filters import shuffle

        size = self.data.stream_shuffle_documents
        for epoch in itertools.count():
            shards = self.shards[source]
            order = [shards[i] for i in feistel(np.arange(len(shards)), len(shards), self.config.seed, start, source, epoch, _SHARDS_DRAW)]
            rng, empty = self._rng(start, source, epoch, _SHUFFLE_DRAW), True
            for found in shuffle(size, initial=size, rng=rng)(self._read(source, order[self.rank :: self.world_size])):
                empty = False
                yield found
            if empty:
                raise UserError(f"{shown_source(self.data.sources[source].path)}: not one sample could be read from its shards")

    def _read(self, source: int, shards: list[Shard]) -> Iterator[tuple[str, RawSample]]:
        """The samples of shards, one after the other. A shard that breaks off is counted, for there is no telling what was in the rest."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for number, shard in enumerate(shards):
            try:
                with stream_of(shard) as stream:
                    for raw in group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}])):
                        yield str(shard), raw
                    while stream.read(1 << 20):  # to its end, where it is seen whether a command has succeeded
                        pass
            except Exception as error:  # whatever a tar or a disk may raise; webdataset adds to what the error says
                ref = SourceRef(shown_source(self.data.sources[source].path), str(shard), number, "(the shard)")
                said = next(iter(error.args), type(error).__name__) if not isinstance(error, OSError) else error
                self.log.add(ref, BadSample(f"reading it ended early ({said})", READ), step=self._step)

    def _rng(self, *key: int) -> random.Random:
        return random.Random(hash_key(self.config.seed, self.rank, *key))


def _reader(raw: RawSample) -> Any:
    return lambda name: raw[split_page(name)[0]]


def _expand(source: SourceConfig, settings: StorageConfig) -> list[Shard]:
    shards = expand_shards(source.path, settings)
    if any(str(shard).removesuffix(".gz").endswith(".jsonl") for shard in shards):
        raise UserError(f"{shown_source(source.path)}: data.mode=stream reads tars; JSON lines are read with data.mode=planned")
    return shards
