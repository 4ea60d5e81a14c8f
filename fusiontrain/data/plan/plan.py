"""Which documents form which packed sequence of which step: a pure function of (seed, index, config), the same for any number of ranks.

The endless stream of documents (`mixture.py`) is cut into windows; each window is packed alone (`windows.py`), its sequences are shuffled, and the
windows' sequences in a row are cut into steps. With `data.io_mode: lanes` there are several such streams, which take turns (`lanes.py`).
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusiontrain.config.schema import Config
from fusiontrain.data.documents import Draws, Place, arrange, draw
from fusiontrain.data.errors import BadSample
from fusiontrain.data.index.shard_index import IMAGE_PIECE, SPEECH_PIECE, IndexedSource
from fusiontrain.data.plan.balance import balance
from fusiontrain.data.plan.lanes import Lanes, even_order, lane_documents
from fusiontrain.data.plan.lengths import mixed_source, one_pass, patches
from fusiontrain.data.plan.mixture import Mixture
from fusiontrain.data.plan.packing import best_fit_decreasing
from fusiontrain.data.plan.permutation import feistel
from fusiontrain.data.plan.windows import Anchor, Windows
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.modality import IMAGE, SPEECH, TEXT
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
    speech_tokens: int = 0


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
        return _cost(self.documents)


class Plan:
    """The plan of one split. Training goes on until every source is used up; validation visits every document once, in order, without dropout.

    truncated, dropped, split: samples too long for a sequence; unfit: those whose latents the patches do not divide. Each visit counts.
    """

    def __init__(self, config: Config, sources: Sequence[IndexedSource], tokenizer: Tokenizer, training: bool) -> None:
        self.data, self.seed, self.training = config.data, config.seed, training
        self.sources, self.begins = tuple(sources), tokenizer.begin_text_id is not None
        self.sequences_per_step, self.num_lanes = config.train.global_batch_sequences, config.data.lanes if config.data.io_mode == "lanes" else 1
        # Validation sees each document once, so sources mix by their sizes.
        mixed = [mixed_source(source, config.data) if training else one_pass(len(source)) for source in sources]
        self.mixture = Mixture(mixed, self.seed, shuffle=training)
        self.num_documents = self.mixture.end
        self.truncated = self.dropped = self.split = self.unfit = 0
        self._counted_windows: set[tuple[int, int]] = set()
        self._places_per_window = config.data.pack_window_documents * self.num_lanes
        kept = max(2 if self.num_lanes > 1 else 4, CACHED_DOCUMENTS // self._places_per_window)
        self._lanes = Lanes([Windows(functools.partial(self._pack, lane), kept) for lane in range(self.num_lanes)])
        self._lock = threading.Lock()
        self._patches = functools.lru_cache(CACHED_SIZES)(lambda height, width: patches(height, width, self.data))
        if training:
            self._require_documents()
            self._warn_of_absent()

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
            speech = sum(document.speech_tokens for s in share for document in s.documents)
            tokens = {TEXT.name: total - image - speech, IMAGE.name: image, SPEECH.name: speech, "padding": len(share) * self.data.sequence_length - total}
            counts.append({name: count for name, count in tokens.items() if name != SPEECH.name or SPEECH.name in self.data.modalities})
        return counts

    def shares(self, step: int, world_size: int) -> list[list[PlannedSequence]]:
        """The sequences of every rank, in the order of the ranks."""
        sequences = self.step(step)
        if self.data.io_mode == "lanes" and len(sequences) == self.sequences_per_step:  # sequence n is of lane n mod lanes, until lanes come to their end
            return [[sequence for sequence in sequences if sequence.number % world_size == rank] for rank in range(world_size)]
        sequences += [PlannedSequence(-1, 0, ())] * (self.sequences_per_step - len(sequences))
        return [[sequences[i] for i in share] for share in balance([(s.cost, s.image_tokens) for s in sequences], world_size)]

    def data_step(self, step: int) -> int:
        """The step of the data that a step of the training uses: the same, but for `data.from_step`."""
        for first, target in reversed(self.data.from_step if self.training else ()):
            if step >= first:
                return target + step - first
        return step

    def anchors(self, step: int) -> tuple[Anchor, ...]:
        """Where planning of each lane may begin in order to reach `step`, whose predecessor has been planned. The same on every rank."""
        with self._lock:
            return self._lanes.anchors(step * self.sequences_per_step)

    def place(self, step: int) -> int:
        """About how many documents of the mixed stream the steps before `step` have used; all of them have been planned."""
        with self._lock:
            return round(self._lanes.windows_before(step * self.sequences_per_step) * self.data.pack_window_documents)

    def begin_at(self, anchors: Sequence[Anchor]) -> None:
        """Forget the windows before anchors that this very plan gave, perhaps in another process. Earlier steps can still be asked for."""
        with self._lock:
            self._lanes.begin_at(anchors)

    def epoch(self, anchors: Sequence[Anchor]) -> int:
        """How often the first source has been gone through at the anchors, in the lane that is furthest back; never decreases from step to step."""
        window = min(anchor.window for anchor in anchors)
        return self.mixture.given(0, window * self._places_per_window) // len(self.sources[0])

    def _require_documents(self) -> None:
        """Raises UserError unless some document is fit for a sequence, for such a plan would look for its first sequence for ever."""
        for first in itertools.count(step=self.data.pack_window_documents):
            if all(self.mixture.given(n, first) >= len(source) for n, source in enumerate(self.sources)):
                break
            if any(self._plan(*document, counts=False) for document in self.mixture.window(first, self.data.pack_window_documents)):
                return
        raise UserError(f"data.sources: not one document fits data.sequence_length={self.data.sequence_length}; raise it, or set data.oversize=truncate")

    def _warn_of_absent(self) -> None:
        """Say which modalities none of the first documents has, if only because they are too long for a sequence."""
        window = self.mixture.window(0, self.data.pack_window_documents)
        first = [part for document in window for part in self._plan(*document, counts=False)]
        seen = {IMAGE.name: any(part.image_tokens for part in first), SPEECH.name: any(part.speech_tokens for part in first)}
        for name in self.data.modalities:
            if not seen.get(name, True):
                logger.warning(
                    "data.modalities names %s, but none of the first %s documents has any that fits data.sequence_length=%s: see `fusiontrain data plan`",
                    name, f"{len(window):,}", self.data.sequence_length,
                )  # fmt: skip

    def _sequence(self, number: int) -> PlannedSequence | None:
        with self._lock:
            documents = self._lanes.sequence(number)
        if documents is None:
            return None
        return PlannedSequence(number, hash_key(self.seed, self.training, number, _NOISE_DRAW), documents)

    def _pack(self, lane: int, window: int, first: int) -> list[tuple[PlannedDocument, ...]] | None:
        """The sequences of a lane's window, whose first has the number `first` in the lane; None behind the last window."""
        place, count = window * self._places_per_window, self._places_per_window
        if self.num_documents is not None and place >= self.num_documents:
            return None
        count = min(count, self.num_documents - place) if self.num_documents is not None else count
        uses_lanes = self.data.io_mode == "lanes"
        mixed = lane_documents(self.mixture, lane, self.num_lanes, place, count) if uses_lanes else self.mixture.window(place, count)
        counts = (lane, window) not in self._counted_windows  # a repetition of the window's packing counts nothing
        documents = [part for document in mixed for part in self._plan(*document, counts)]
        self._counted_windows.add((lane, window))
        groups = [tuple(documents[i] for i in group) for group in best_fit_decreasing([d.num_tokens for d in documents], self.data.sequence_length)]
        if uses_lanes:
            order = even_order([_cost(group) for group in groups], first, lane, self.num_lanes, self.sequences_per_step, self.seed)
        else:
            order = feistel(np.arange(len(groups)), len(groups), self.seed, window, _WINDOW_DRAW).tolist()
        return [groups[i] for i in order]

    def _plan(self, source_number: int, epoch: int, sample: int, counts: bool) -> list[PlannedDocument]:
        """The documents that a sample becomes, as the index knows it; none where it is left out. counts: such samples, for it is a first visit."""
        source = self.sources[source_number]
        shard, row = source.locate(sample)
        index = source.indexes[shard]
        pieces = index.pieces(row)
        kinds = index.kinds[pieces].tolist()
        is_pair = bool(index.is_pair[row])
        try:
            tokens = [
                self._patches(height, width) if kind == IMAGE_PIECE else width if kind == SPEECH_PIECE else count
                for kind, count, height, width in zip(
                    kinds, source.tokens[shard].counts[pieces].tolist(), index.heights[pieces].tolist(), index.widths[pieces].tolist(), strict=True
                )
            ]
        except BadSample as error:
            if counts:
                logger.warning("left out %s: %s", source.ref(sample), error)
            self.unfit += counts
            return []
        draws = NO_DRAWS  # a document of several images in an order of its own has nothing to draw
        if is_pair or kinds.count(IMAGE_PIECE) == 1:
            draws = draw(self.data, source.config, (self.seed, epoch, source_number, sample, _DOCUMENT_DRAW), is_pair, self.training)
        parts = arrange(kinds, tokens, is_pair, draws, self.data, self.begins)
        cut = not parts or parts[-1].cut
        if not parts or (cut and self.data.oversize == "drop"):
            self.dropped += counts
            return []
        self.truncated += cut and counts
        self.split += len(parts) > 1 and counts
        return [
            PlannedDocument(
                source_number, epoch, sample, part.places, part.cut, part.num_tokens,
                _tokens(part.places, IMAGE_PIECE), number, _tokens(part.places, SPEECH_PIECE),
            )
            for number, part in enumerate(parts)
        ]  # fmt: skip


def check_world_size(config: Config, world_size: int) -> None:
    """Raises UserError, naming the nearest sizes that work, where a step or the lanes cannot be shared evenly."""
    sequences = config.train.global_batch_sequences
    if sequences % world_size:
        raise UserError(
            f"train.global_batch_sequences={sequences}: {world_size} ranks cannot share it evenly; nearest sizes that they can: {_near(sequences, world_size)}"
        )
    lanes = config.data.lanes if config.data.mode == "planned" and config.data.io_mode == "lanes" else world_size
    if lanes % world_size:
        sizes = [size for size in range(1, lanes + 1) if lanes % size == sequences % size == 0]
        near = [str(size) for size in (max((s for s in sizes if s < world_size), default=0), min((s for s in sizes if s > world_size), default=0)) if size]
        raise UserError(
            f"data.lanes={lanes}: {world_size} ranks cannot own equally many; nearest numbers of ranks that can: {', '.join(near)}; "
            f"a new run may have {_near(lanes, world_size)} lanes"
        )


def _near(number: int, divisor: int) -> str:
    below = number // divisor * divisor
    return ", ".join(str(size) for size in (below, below + divisor) if size)


def _tokens(places: Sequence[Place], kind: int) -> int:
    return sum(place.num_tokens for place in places if place.kind == kind)


def _cost(documents: Sequence[PlannedDocument]) -> int:
    area = sum(document.num_tokens**2 for document in documents) // 2
    return sum(document.image_tokens for document in documents) + area // PAIRS_PER_TOKEN
