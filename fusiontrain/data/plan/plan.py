"""Which documents form which packed sequence of which step: a pure function of (seed, index, config), the same for any number of ranks.

The endless stream of documents (`mixture.py`) is cut into windows; each window is packed alone, its sequences are shuffled, and the windows'
sequences in a row are cut into steps. So any step follows from its number alone; how many sequences the windows before it have is the one thing
that takes time to find out, so an `Anchor` in the resume state keeps that.
"""

from __future__ import annotations

import bisect
import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusiontrain.config.schema import Config
from fusiontrain.data.documents import Draws, Place, arrange, draw
from fusiontrain.data.errors import BadSample
from fusiontrain.data.index.shard_index import IMAGE_PIECE, IndexedSource
from fusiontrain.data.plan.balance import balance
from fusiontrain.data.plan.lengths import mixed_source, one_pass, patches
from fusiontrain.data.plan.mixture import Mixture
from fusiontrain.data.plan.packing import best_fit_decreasing
from fusiontrain.data.plan.permutation import feistel
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.modality import IMAGE, TEXT
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import hash_key

logger = logging.getLogger(__name__)

CACHED_DOCUMENTS, CACHED_SIZES = 16_384, 65_536
PAIRS_PER_TOKEN = 24_576
"""Attended pairs of tokens that cost as much as one image token's own weights do: 6 x the width of the model, of 4,096 here."""

NO_DRAWS = Draws(image_first=False, drop_condition=False)
_WINDOW_DRAW, _NOISE_DRAW, _DOCUMENT_DRAW = 11, 12, 13


@dataclass(frozen=True, slots=True)
class PlannedDocument:
    """A document of a sequence: where it comes from, what of it is shown, and its size in tokens.

    part: 0, or its number among the documents that a sample was split into. cut: it ends before its sample does.
    """

    source: int
    epoch: int
    sample: int
    places: tuple[Place, ...]
    cut: bool
    num_tokens: int
    image_tokens: int
    part: int = 0


@dataclass(frozen=True)
class PlannedSequence:
    """Documents of one packed sequence and its number in the whole run, which keys its noise."""

    number: int
    noise_key: int
    documents: tuple[PlannedDocument, ...]

    @property
    def image_tokens(self) -> int:
        return sum(document.image_tokens for document in self.documents)

    @property
    def num_tokens(self) -> int:
        return sum(document.num_tokens for document in self.documents)

    @property
    def cost(self) -> int:
        """What ranks are balanced by, in image tokens: text tokens cost the same in every sequence, for padding is computed too."""
        area = sum(document.num_tokens**2 for document in self.documents) // 2
        return self.image_tokens + area // PAIRS_PER_TOKEN


@dataclass(frozen=True)
class Anchor:
    """The number of a window and of its first sequence in the whole run: where planning may begin instead of at 0."""

    window: int = 0
    sequence: int = 0


class Plan:
    """The plan of one split. Training goes on until every source is used up; validation visits every document once, in order, without dropout.

    truncated, dropped, split: samples too long for a sequence; unfit: those whose latents the patches do not divide. Each visit counts.
    """

    def __init__(self, config: Config, sources: Sequence[IndexedSource], tokenizer: Tokenizer, training: bool) -> None:
        self.data, self.seed, self.training = config.data, config.seed, training
        self.sources, self.begins = tuple(sources), tokenizer.begin_text_id is not None
        self.sequences_per_step = config.train.global_batch_sequences
        # Validation sees each document once, so sources mix by their sizes.
        mixed = [mixed_source(source, config.data) if training else one_pass(len(source)) for source in sources]
        self.mixture = Mixture(mixed, self.seed, shuffle=training)
        self.num_documents = self.mixture.end
        self.truncated = self.dropped = self.split = self.unfit = 0
        self._counted_windows: set[int] = set()
        self._first_window, self._first_sequence = 0, [0]  # first_sequence[i]: of window first_window + i
        self._cache: OrderedDict[int, list[tuple[PlannedDocument, ...]]] = OrderedDict()
        self._lock = threading.Lock()
        self._patches = functools.lru_cache(CACHED_SIZES)(lambda height, width: patches(height, width, self.data))
        if training:
            self._require_documents()

    def step(self, step: int) -> list[PlannedSequence]:
        """The sequences of step 0, 1, ...; fewer than a full step, or none, only at the end of a validation split.

        Raises UserError where the sources of a training are used up.
        """
        first = step * self.sequences_per_step
        found = [sequence for n in range(first, first + self.sequences_per_step) if (sequence := self._sequence(n)) is not None]
        if self.training and len(found) < self.sequences_per_step:
            raise UserError(f"data.sources: all are used up before step {step + 1}; lower train.steps to {step} at most, or raise max_epochs of a source")
        return found

    def share(self, step: int, rank: int, world_size: int) -> list[PlannedSequence]:
        """A rank's sequences of a step, always the same number for every rank. The ranks get even costs.

        Where a validation split ends inside the step, sequences without documents fill up.
        """
        return self.shares(step, world_size)[rank]

    def counts(self, step: int, world_size: int) -> list[dict[str, int]]:
        """The tokens of each rank in a step, per modality and as padding, in the order of the ranks; every rank knows them all."""
        counts = []
        for share in self.shares(step, world_size):
            image, total = sum(s.image_tokens for s in share), sum(s.num_tokens for s in share)
            counts.append({TEXT.name: total - image, IMAGE.name: image, "padding": len(share) * self.data.sequence_length - total})
        return counts

    def shares(self, step: int, world_size: int) -> list[list[PlannedSequence]]:
        """The sequences of every rank, in the order of the ranks."""
        sequences = self.step(step)
        sequences += [PlannedSequence(-1, 0, ())] * (self.sequences_per_step - len(sequences))
        return [[sequences[i] for i in share] for share in balance([(s.cost, s.image_tokens) for s in sequences], world_size)]

    def data_step(self, step: int) -> int:
        """The step of the data that a step of the training uses: the same, but for `data.from_step`."""
        for first, target in reversed(self.data.from_step if self.training else ()):
            if step >= first:
                return target + step - first
        return step

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

    def place(self, step: int) -> int:
        """About how many documents of the mixed stream the steps before `step` have used; all of them have been planned."""
        anchor = self.anchor(step)
        with self._lock:
            packed = self._pack(anchor.window)
        inside = (step * self.sequences_per_step - anchor.sequence) / max(1, len(packed))
        return round((anchor.window + inside) * self.data.pack_window_documents)

    def begin_at(self, anchor: Anchor) -> None:
        """Forget the windows before an anchor that this very plan gave, perhaps in another process. Earlier steps can still be asked for."""
        with self._lock:
            self._first_window, self._first_sequence = anchor.window, [anchor.sequence]

    def epoch(self, anchor: Anchor) -> int:
        """How often the first source has been gone through at an anchor; never decreases from step to step."""
        return self.mixture.given(0, anchor.window * self.data.pack_window_documents) // len(self.sources[0])

    def _require_documents(self) -> None:
        """Raises UserError unless some document is fit for a sequence, for such a plan would look for its first sequence for ever."""
        window = 0
        while not self._is_past_the_end(window):
            first = window * self.data.pack_window_documents
            if all(self.mixture.given(n, first) >= len(source) for n, source in enumerate(self.sources)):
                break
            if any(self._plan(window, *document, counts=False) for document in self.mixture.window(first, self.data.pack_window_documents)):
                return
            window += 1
        raise UserError(f"data.sources: not one document fits data.sequence_length={self.data.sequence_length}; raise it, or set data.oversize=truncate")

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
        documents = [part for document in self.mixture.window(first, count) for part in self._plan(window, *document)]
        self._counted_windows.add(window)  # from here on a repetition of the window's packing counts nothing
        groups = best_fit_decreasing([document.num_tokens for document in documents], self.data.sequence_length)
        order = feistel(np.arange(len(groups)), len(groups), self.seed, window, _WINDOW_DRAW)
        return [tuple(documents[i] for i in groups[g]) for g in order]

    def _plan(self, window: int, source_number: int, epoch: int, sample: int, counts: bool = True) -> list[PlannedDocument]:
        """The documents that a sample of a window becomes, as the index knows it; none where it is left out, which is counted."""
        source = self.sources[source_number]
        shard, row = source.locate(sample)
        index = source.indexes[shard]
        pieces = index.pieces(row)
        kinds = index.kinds[pieces].tolist()
        is_pair, first_visit = bool(index.is_pair[row]), counts and window not in self._counted_windows
        try:
            tokens = [
                self._patches(height, width) if kind == IMAGE_PIECE else count
                for kind, count, height, width in zip(
                    kinds, source.tokens[shard].counts[pieces].tolist(), index.heights[pieces].tolist(), index.widths[pieces].tolist(), strict=True
                )
            ]
        except BadSample as error:
            if first_visit:
                logger.warning("left out %s: %s", source.ref(sample), error)
            self.unfit += first_visit
            return []
        draws = NO_DRAWS  # a document of several images in an order of its own has nothing to draw
        if is_pair or kinds.count(IMAGE_PIECE) == 1:
            draws = draw(self.data, source.config, (self.seed, epoch, source_number, sample, _DOCUMENT_DRAW), is_pair, self.training)
        parts = arrange(kinds, tokens, is_pair, draws, self.data, self.begins)
        cut = not parts or parts[-1].cut
        if not parts or (cut and self.data.oversize == "drop"):
            self.dropped += first_visit
            return []
        self.truncated += cut and first_visit
        self.split += len(parts) > 1 and first_visit
        return [
            PlannedDocument(
                source_number, epoch, sample, part.places, part.cut, part.num_tokens,
                sum(place.num_tokens for place in part.places if place.kind == IMAGE_PIECE), number,
            )
            for number, part in enumerate(parts)
        ]  # fmt: skip


def check_world_size(sequences_per_step: int, world_size: int) -> None:
    """Raises UserError, naming the nearest sizes that work, where a step cannot be shared evenly."""
    if sequences_per_step % world_size:
        below = sequences_per_step // world_size * world_size
        near = [str(size) for size in (below, below + world_size) if size]
        raise UserError(
            f"train.global_batch_sequences={sequences_per_step}: {world_size} ranks cannot share it evenly; nearest sizes that they can: {', '.join(near)}"
        )
