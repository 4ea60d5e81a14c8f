"""Which documents form which packed sequence of which step: a pure function of (seed, index, config), the same for any number of ranks.

The endless stream of documents (`mixture.py`) is cut into windows; each window is packed alone, its sequences are shuffled, and the windows'
sequences in a row are cut into steps. So any step follows from its number alone; how many sequences the windows before it have is the one thing
that takes time to find out, so an `Anchor` in the resume state keeps that.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from fusiontrain.config.schema import Config, DataConfig
from fusiontrain.data.documents import Place, arrange, draw
from fusiontrain.data.errors import BadSample
from fusiontrain.data.index import IMAGE_PIECE, IndexedSource
from fusiontrain.data.mixture import Mixture, permutation
from fusiontrain.data.modalities.image import grid_of
from fusiontrain.data.packing import best_fit_decreasing
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import hash_key

logger = logging.getLogger(__name__)

VERSION = 2
CACHED_DOCUMENTS = 16_384
_WINDOW_DRAW, _NOISE_DRAW, _DOCUMENT_DRAW = 11, 12, 13


@dataclass(frozen=True)
class PlannedDocument:
    """A document of a sequence: where it comes from, what of it is shown, and its size in tokens. cut: it was too long for a sequence."""

    source: int
    epoch: int
    sample: int
    places: tuple[Place, ...]
    cut: bool
    num_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class PlannedSequence:
    """Documents of one packed sequence and its number in the whole run, which keys its noise."""

    number: int
    noise_key: int
    documents: tuple[PlannedDocument, ...]

    @property
    def image_tokens(self) -> int:
        return sum(document.image_tokens for document in self.documents)


@dataclass(frozen=True)
class Anchor:
    """The number of a window and of its first sequence in the whole run: where planning may begin instead of at 0."""

    window: int = 0
    sequence: int = 0


class Plan:
    """The plan of one split. Training goes on for ever; validation visits every document once, in order, without dropout.

    truncated, dropped: documents too long for a sequence; unfit: those whose latents the patches do not divide. Each visit counts.
    """

    def __init__(self, config: Config, sources: Sequence[IndexedSource], tokenizer: Tokenizer, training: bool) -> None:
        self.data, self.seed, self.training = config.data, config.seed, training
        self.sources, self.begins = tuple(sources), tokenizer.begin_text_id is not None
        self.sequences_per_step = config.train.global_batch_sequences
        weights = [source.config.weight for source in sources]
        sizes = [len(source) for source in sources]
        # Validation sees each document once, so sources mix by their sizes.
        self.mixture = Mixture(sizes, weights if training else sizes, self.seed, shuffle=training)
        self.num_documents = None if training else sum(sizes)
        self.truncated = self.dropped = self.unfit = 0
        self._counted_windows: set[int] = set()
        self._first_window, self._first_sequence = 0, [0]  # first_sequence[i]: of window first_window + i
        self._cache: OrderedDict[int, list[tuple[PlannedDocument, ...]]] = OrderedDict()
        self._lock = threading.Lock()
        if training:
            self._require_documents()

    def step(self, step: int) -> list[PlannedSequence]:
        """The sequences of step 0, 1, ...; fewer than a full step, or none, only at the end of a validation split."""
        first = step * self.sequences_per_step
        return [sequence for n in range(first, first + self.sequences_per_step) if (sequence := self._sequence(n)) is not None]

    def share(self, step: int, rank: int, world_size: int) -> list[PlannedSequence]:
        """A rank's sequences of a step, always the same number for every rank. The ranks get even numbers of image tokens.

        Where a validation split ends inside the step, sequences without documents fill up.
        """
        per_rank = self.sequences_per_step // world_size
        shares: list[list[PlannedSequence]] = [[] for _ in range(world_size)]
        lightest_first = [(0, r) for r in range(world_size)]  # (image tokens, rank) of the ranks with room
        for sequence in sorted(self.step(step), key=lambda s: (-s.image_tokens, s.number)):
            load, lightest = heapq.heappop(lightest_first)
            shares[lightest].append(sequence)
            if len(shares[lightest]) < per_rank:
                heapq.heappush(lightest_first, (load + sequence.image_tokens, lightest))
        mine = sorted(shares[rank], key=lambda s: s.number)
        return mine + [PlannedSequence(-1, 0, ())] * (per_rank - len(mine))

    def anchor(self, step: int) -> Anchor:
        """Where planning may begin in order to reach `step`, whose predecessor has been planned. The same on every rank."""
        number = step * self.sequences_per_step
        with self._lock:
            place = bisect.bisect_left(self._first_sequence, number)
            if place == len(self._first_sequence) or self._first_sequence[place] > number:
                place -= 1
            if place < 0:
                return Anchor()
            return Anchor(self._first_window + place, self._first_sequence[place])

    def begin_at(self, anchor: Anchor) -> None:
        """Forget the windows before an anchor that this very plan gave, perhaps in another process. Earlier steps can still be asked for."""
        with self._lock:
            self._first_window, self._first_sequence = anchor.window, [anchor.sequence]

    def epoch(self, anchor: Anchor) -> int:
        """How often the first source has been gone through at an anchor; never decreases from step to step."""
        return self.mixture.given(0, anchor.window * self.data.pack_window_documents) // self.mixture.sizes[0]

    def _require_documents(self) -> None:
        """Raises UserError unless some document is fit for a sequence, for such a plan would look for its first sequence for ever."""
        places = max(-(-size // share) for size, share in zip(self.mixture.sizes, self.mixture.shares, strict=True))
        for window in range(int(places) // self.data.pack_window_documents + 1):
            if self._pack(window):
                return
        raise UserError(
            f"data.sources: not one document fits data.sequence_length={self.data.sequence_length}; raise it, or set data.oversize=truncate"
        )

    def _sequence(self, number: int) -> PlannedSequence | None:
        with self._lock:
            if number < self._first_sequence[0]:
                self._first_window, self._first_sequence = 0, [0]
            while self._first_sequence[-1] <= number:
                window = self._first_window + len(self._first_sequence) - 1
                packed = self._pack(window)
                if not packed and self._is_past_the_end(window):
                    return None
                self._first_sequence.append(self._first_sequence[-1] + len(packed))
            place = bisect.bisect_right(self._first_sequence, number) - 1
            documents = self._pack(self._first_window + place)[number - self._first_sequence[place]]
        return PlannedSequence(number, hash_key(self.seed, self.training, number, _NOISE_DRAW), documents)

    def _is_past_the_end(self, window: int) -> bool:
        return self.num_documents is not None and window * self.data.pack_window_documents >= self.num_documents

    def _pack(self, window: int) -> list[tuple[PlannedDocument, ...]]:
        if window not in self._cache:
            self._cache[window] = self._pack_anew(window)
            if len(self._cache) > max(4, CACHED_DOCUMENTS // self.data.pack_window_documents):
                self._cache.popitem(last=False)
        self._cache.move_to_end(window)
        return self._cache[window]

    def _pack_anew(self, window: int) -> list[tuple[PlannedDocument, ...]]:
        first, count = window * self.data.pack_window_documents, self.data.pack_window_documents
        if self.num_documents is not None:
            count = max(0, min(count, self.num_documents - first))
        planned = [self._plan(window, *document) for document in self.mixture.window(first, count)]
        documents = [document for document in planned if document is not None]
        self._counted_windows.add(window)  # from here on a repetition of the window's packing counts nothing
        groups = best_fit_decreasing([document.num_tokens for document in documents], self.data.sequence_length)
        order = permutation(len(groups), self.seed, window, _WINDOW_DRAW)
        return [tuple(documents[i] for i in groups[g]) for g in order]

    def _plan(self, window: int, source_number: int, epoch: int, sample: int) -> PlannedDocument | None:
        """A document of a window as the index knows it; None for one that is left out, which is counted."""
        source = self.sources[source_number]
        shard, row = source.locate(sample)
        index = source.indexes[shard]
        pieces = slice(int(index.piece_start[row]), int(index.piece_start[row + 1]))
        kinds = index.kinds[pieces].tolist()
        is_pair, first_visit = bool(index.is_pair[row]), window not in self._counted_windows
        try:
            tokens = [
                patches(height, width, self.data) if kind == IMAGE_PIECE else count
                for kind, count, height, width in zip(
                    kinds, index.tokens[pieces].tolist(), index.heights[pieces].tolist(), index.widths[pieces].tolist(), strict=True
                )
            ]
        except BadSample as error:
            if first_visit:
                logger.warning("left out %s: %s", source.ref(sample), error)
            self.unfit += first_visit
            return None
        draws = draw(self.data, source.config, (self.seed, epoch, source_number, sample, _DOCUMENT_DRAW), is_pair, self.training)
        places, length, cut = arrange(kinds, tokens, is_pair, draws, self.data, self.begins)
        if cut and (self.data.oversize == "drop" or not places):
            self.dropped += first_visit
            return None
        self.truncated += cut and first_visit
        image_tokens = sum(place.num_tokens for place in places if place.kind == IMAGE_PIECE)
        return PlannedDocument(source_number, epoch, sample, places, cut, length, image_tokens)


def patches(height: int, width: int, data: DataConfig) -> int:
    """Tokens of an image of that size."""
    rows, columns = grid_of(height, width, data.image)
    return rows * columns


def check_world_size(sequences_per_step: int, world_size: int) -> None:
    """Raises UserError, naming the nearest sizes that work, where a step cannot be shared evenly."""
    if sequences_per_step % world_size:
        below = sequences_per_step // world_size * world_size
        near = [str(size) for size in (below, below + world_size) if size]
        raise UserError(
            f"train.global_batch_sequences={sequences_per_step}: {world_size} ranks cannot share it evenly; nearest sizes that they can: {', '.join(near)}"
        )


def plan_fields(config: Config, sources: Sequence[IndexedSource], tokenizer: Tokenizer) -> dict[str, str]:
    """What the order of the data depends on, by name: two runs see the same data exactly where these are equal."""
    data = config.data
    return {
        "plan version": str(VERSION),
        "seed": str(config.seed),
        "train.global_batch_sequences": str(config.train.global_batch_sequences),
        "data.sequence_length": str(data.sequence_length),
        "data.modalities": ",".join(data.modalities),
        "data.image": data.image.model_dump_json(),
        "data.condition_dropout": repr(data.condition_dropout),
        "data.oversize": data.oversize,
        "data.document_mask": str(data.document_mask),
        "data.pack_window_documents": str(data.pack_window_documents),
        "data.tokenizer": tokenizer.fingerprint,
        **{f"data.sources.{source.number}.{name}": value for source in sources for name, value in _source_fields(source).items()},
    }


def fingerprint(fields: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _source_fields(source: IndexedSource) -> dict[str, str]:
    """The mixing policy and the content of the index; the path may change, the samples may not."""
    digest = hashlib.sha256()
    for index in source.indexes:
        for array in (index.keys, index.is_pair, index.piece_start, index.kinds, index.tokens, index.heights, index.widths, index.sizes):
            digest.update(array.tobytes())
    config = source.config
    return {
        "weight": repr(config.weight),
        "image_first_probability": repr(config.image_first_probability),
        "samples": digest.hexdigest(),
    }
