"""Which documents form which packed sequence of which step: a pure function of (seed, index, config), the same for any number of ranks.

The endless stream of documents (`mixture.py`) is cut into windows; each window is packed alone, its sequences are shuffled, and the windows'
sequences in a row are cut into steps. So any step can be found from its number, and resuming needs no state but that number.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from fusiontrain.config.schema import Config, DataConfig
from fusiontrain.data.documents import Place, arrange, draw
from fusiontrain.data.index import IMAGE_PIECE, IndexedSource
from fusiontrain.data.mixture import Mixture, permutation
from fusiontrain.data.modalities.image import grid_of
from fusiontrain.data.packing import best_fit_decreasing
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import hash_key

VERSION = 1
_WINDOW_DRAW, _NOISE_DRAW, _DOCUMENT_DRAW = 11, 12, 13


@dataclass(frozen=True)
class PlannedDocument:
    """A document of a sequence: where it comes from, what of it is shown, and its size in tokens."""

    source: int
    epoch: int
    sample: int
    places: tuple[Place, ...]
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


class Plan:
    """The plan of one split. Training goes on for ever; validation visits every document once, in order, without dropout."""

    def __init__(self, config: Config, sources: Sequence[IndexedSource], tokenizer: Tokenizer, training: bool) -> None:
        self.data, self.seed, self.training = config.data, config.seed, training
        self.sources, self.begins = tuple(sources), tokenizer.begin_text_id is not None
        self.sequences_per_step = config.train.global_batch_sequences
        weights = [source.config.weight for source in sources]
        sizes = [len(source) for source in sources]
        # Validation sees each document once, so sources mix by their sizes.
        self.mixture = Mixture(sizes, weights if training else sizes, self.seed, shuffle=training)
        self.num_documents = None if training else sum(sizes)
        self.truncated = self.dropped = 0
        self._first_sequence = [0]  # of window w, for the windows packed so far
        self._cache: dict[int, list[tuple[PlannedDocument, ...]]] = {}
        self._lock = threading.Lock()
        if training and not self._pack(0):
            raise UserError("data.sources: none of the first documents fits data.sequence_length; raise it, or set data.oversize=truncate")

    def step(self, step: int) -> list[PlannedSequence]:
        """The sequences of step 0, 1, ...; fewer than a full step, or none, only at the end of a validation split."""
        first = step * self.sequences_per_step
        return [sequence for n in range(first, first + self.sequences_per_step) if (sequence := self._sequence(n)) is not None]

    def share(self, step: int, rank: int, world_size: int) -> list[PlannedSequence]:
        """A rank's sequences of a step, always the same number for every rank. The ranks get even numbers of image tokens.

        Where a validation split ends inside the step, sequences without documents fill up.
        """
        sequences = self.step(step)
        per_rank = self.sequences_per_step // world_size
        loads, shares = [0] * world_size, [[] for _ in range(world_size)]  # type: list[int], list[list[PlannedSequence]]
        for sequence in sorted(sequences, key=lambda s: (-s.image_tokens, s.number)):
            open_ranks = [r for r in range(world_size) if len(shares[r]) < per_rank]
            lightest = min(open_ranks, key=lambda r: (loads[r], r))
            loads[lightest] += sequence.image_tokens
            shares[lightest].append(sequence)
        mine = sorted(shares[rank], key=lambda s: s.number)
        return mine + [PlannedSequence(-1, 0, ())] * (per_rank - len(mine))

    def epoch(self, step: int) -> int:
        """The epoch that the first source is in where the window of the step begins; never decreases."""
        self._sequence(step * self.sequences_per_step)
        window = _last_not_above(self._first_sequence, step * self.sequences_per_step)
        return self.mixture.given(0, window * self.data.pack_window_documents) // self.mixture.sizes[0]

    def _sequence(self, number: int) -> PlannedSequence | None:
        with self._lock:
            while self._first_sequence[-1] <= number:
                window = len(self._first_sequence) - 1
                packed = self._pack(window)
                if not packed and self._is_past_the_end(window):
                    return None
                self._first_sequence.append(self._first_sequence[-1] + len(packed))
            window = _last_not_above(self._first_sequence, number)
            documents = self._pack(window)[number - self._first_sequence[window]]
        return PlannedSequence(number, hash_key(self.seed, self.training, number, _NOISE_DRAW), documents)

    def _is_past_the_end(self, window: int) -> bool:
        return self.num_documents is not None and window * self.data.pack_window_documents >= self.num_documents

    def _pack(self, window: int) -> list[tuple[PlannedDocument, ...]]:
        if window not in self._cache:
            if len(self._cache) > 4:
                self._cache.clear()
            self._cache[window] = self._pack_anew(window)
        return self._cache[window]

    def _pack_anew(self, window: int) -> list[tuple[PlannedDocument, ...]]:
        first, count = window * self.data.pack_window_documents, self.data.pack_window_documents
        if self.num_documents is not None:
            count = max(0, min(count, self.num_documents - first))
        planned = [self._plan(*document) for document in self.mixture.window(first, count)]
        documents = [document for document in planned if document is not None]
        groups = best_fit_decreasing([document.num_tokens for document in documents], self.data.sequence_length)
        order = permutation(len(groups), self.seed, window, _WINDOW_DRAW)
        return [tuple(documents[i] for i in groups[g]) for g in order]

    def _plan(self, source_number: int, epoch: int, sample: int) -> PlannedDocument | None:
        """A document as the index knows it; None for one that `data.oversize=drop` leaves out."""
        source = self.sources[source_number]
        shard, row = source.locate(sample)
        index = source.indexes[shard]
        pieces = slice(int(index.piece_start[row]), int(index.piece_start[row + 1]))
        kinds = index.kinds[pieces].tolist()
        tokens = [
            patches(height, width, self.data) if kind == IMAGE_PIECE else count
            for kind, count, height, width in zip(
                kinds, index.tokens[pieces].tolist(), index.heights[pieces].tolist(), index.widths[pieces].tolist(), strict=True
            )
        ]
        draws = draw(self.data, source.config, (self.seed, epoch, source_number, sample, _DOCUMENT_DRAW), self.training)
        places, length, cut = arrange(kinds, tokens, bool(index.is_pair[row]), draws, self.data, self.begins)
        if cut and self.data.oversize == "drop":
            self.dropped += 1
            return None
        self.truncated += cut
        image_tokens = sum(place.num_tokens for place in places if place.kind == IMAGE_PIECE)
        return PlannedDocument(source_number, epoch, sample, places, length, image_tokens)


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
        **{f"data.sources.{source.number}": _source_digest(source) for source in sources},
    }


def fingerprint(fields: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _source_digest(source: IndexedSource) -> str:
    """Over the content of the index and the mixing policy; the path may change, the samples may not."""
    digest = hashlib.sha256(repr((source.config.weight, source.config.image_first_probability)).encode())
    for index in source.indexes:
        for array in (index.keys, index.is_pair, index.piece_start, index.kinds, index.tokens, index.heights, index.widths, index.sizes):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _last_not_above(starts: Sequence[int], number: int) -> int:
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if starts[middle] <= number else (low, middle - 1)
    return low
