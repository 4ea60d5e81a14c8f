"""Lanes: streams of documents that never share a chunk of neighbours, so that whoever has a lane to itself reads each of its chunks alone.

There is a fixed number of them, whatever the number of ranks. Each packs its own documents; sequence n of the run is the next one of lane n modulo
their number. So rank r of W ranks owns the lanes l with l modulo W = r, in every step equally many sequences. `data.io_mode: global` is one lane
of all documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from fusiontrain.data.plan.mixture import Mixture
from fusiontrain.data.plan.permutation import CHUNK_DOCUMENTS, feistel
from fusiontrain.data.plan.windows import Anchor, Windows
from fusiontrain.utils.keyed import hash_key

T = TypeVar("T")

_CHUNK_DRAW, _SHORT_DRAW, _FIRST_LANE_DRAW, _DOCUMENT_DRAW, _COST_DRAW = 31, 32, 33, 34, 35


class Lanes(Generic[T]):
    """The sequences of all lanes in the order of the run. Its owner sees to it that one thread at a time asks.

    As long as every lane has sequences they take turns: turn t holds sequence t of each. The first turn for which one of them has none begins the
    ending, where the others go on without it; only there a sequence's lane does not follow from its number.
    """

    def __init__(self, lanes: Sequence[Windows[T]]) -> None:
        self._lanes = tuple(lanes)
        self._full_turns = 0
        self._ending: tuple[int, list[tuple[int, int]]] | None = None  # its first turn, and (lane, number in the lane) of each of its sequences

    def sequence(self, number: int) -> T | None:
        """The sequence of that number in the run; None behind the last."""
        turn, lane = divmod(number, len(self._lanes))
        if self.is_full(turn):
            return self._lanes[lane].sequence(turn)
        first, ending = self._find_ending()
        place = number - first * len(self._lanes)
        if place >= len(ending):
            return None
        lane, inside = ending[place]
        return self._lanes[lane].sequence(inside)

    def is_full(self, turn: int) -> bool:
        """Whether every lane has a sequence in this turn."""
        if turn >= self._full_turns and all(lane.has(turn) for lane in self._lanes):
            self._full_turns = turn + 1
        return turn < self._full_turns

    def anchors(self, number: int) -> tuple[Anchor, ...]:
        """Where each lane's planning may begin in order to reach a sequence, whose predecessors have been planned: with its turn."""
        return tuple(lane.anchor(number // len(self._lanes)) for lane in self._lanes)

    def windows_before(self, number: int) -> float:
        """How many windows, in parts of one, the turns before that of a sequence have used; its predecessors have been planned."""
        return sum(lane.windows_before(number // len(self._lanes)) for lane in self._lanes)

    def begin_at(self, anchors: Sequence[Anchor]) -> None:
        """Forget the windows before anchors that these very lanes gave, perhaps in another process."""
        for lane, anchor in zip(self._lanes, anchors, strict=True):
            lane.begin_at(anchor)

    def _find_ending(self) -> tuple[int, list[tuple[int, int]]]:
        if self._ending is None:
            ends = [lane.end() for lane in self._lanes]
            turns = range(min(ends), max(ends))
            self._ending = min(ends), [(lane, turn) for turn in turns for lane, end in enumerate(ends) if turn < end]
        return self._ending


def lane_documents(mixture: Mixture, lane: int, lanes: int, first: int, count: int) -> list[tuple[int, int, int]]:
    """(source, epoch, sample) of those documents at places `first` .. `first + count - 1` of the mixed stream that are a lane's.

    An epoch of a source is its chunks of CHUNK_DOCUMENTS neighbours, permuted where the mixture shuffles; the chunks of all its epochs in a row go
    to the lanes in turn. A chunk that the stretch of the stream cuts goes on in the same lane.
    """
    found: list[tuple[int, int, int]] = []
    for number in range(len(mixture.sources)):
        found += _documents_of(mixture, number, lane, lanes, mixture.given(number, first), mixture.given(number, first + count))
    if mixture.shuffle:
        found = [found[i] for i in feistel(np.arange(len(found)), len(found), mixture.seed, lane, first, _DOCUMENT_DRAW).tolist()]
    return found


def even_order(costs: Sequence[int], first: int, lane: int, lanes: int, sequences_per_step: int, seed: int) -> list[int]:
    """Indices of `costs` in the order in which a lane gives the sequences of a window, from its sequence `first` on.

    Lanes cannot swap sequences, so for ranks to have even work each lane gives a cheap or a dear one at the same time: for every turn all draw the
    same number, and the sequence whose place by cost among those of its window is that number's place among the window's turns comes. Where a
    lane gives k sequences to a step, one is of each k-th part of the costs. Where a turn is more than a step, each step draws anew.
    """
    per_step = max(1, sequences_per_step // lanes)
    begin, end = first // per_step * per_step, -(-(first + len(costs)) // per_step) * per_step
    draws = np.array([hash_key(seed, (turn * lanes + lane) // min(sequences_per_step, lanes), _COST_DRAW) for turn in range(begin, end)], np.int64)
    part = draws.reshape(-1, per_step).argsort(axis=1).argsort(axis=1).ravel()
    inside = slice(first - begin, first - begin + len(costs))
    order = np.empty(len(costs), np.int64)
    order[np.lexsort((draws[inside], part[inside]))] = np.argsort(np.array(costs, np.int64), kind="stable")
    return order.tolist()


def _documents_of(mixture: Mixture, number: int, lane: int, lanes: int, begin: int, end: int) -> list[tuple[int, int, int]]:
    """A lane's part of the documents `begin` .. `end - 1` that a source gives."""
    if begin == end:
        return []
    order = _ChunkOrder(mixture, number)
    first, last = order.ordinal(begin), order.ordinal(end - 1)
    shift = (lane - hash_key(mixture.seed, number, _FIRST_LANE_DRAW) - first) % lanes
    epochs, slots = np.divmod(np.arange(first + shift, last + 1, lanes), order.chunks)
    found = []
    for epoch in np.unique(epochs).tolist():
        mine = slots[epochs == epoch]
        for start, chunk in zip(order.starts(epoch, mine).tolist(), order.numbers(epoch, mine).tolist(), strict=True):
            length = min(CHUNK_DOCUMENTS, order.size - chunk * CHUNK_DOCUMENTS)
            found += [(number, epoch, chunk * CHUNK_DOCUMENTS + i) for i in range(max(0, begin - start), min(length, end - start))]
    return found


class _ChunkOrder:
    """The chunks of a source in the order of its epochs. Chunk c holds samples from c * CHUNK_DOCUMENTS on in every epoch; the last may be short, and
    its slot in the epoch is drawn."""

    def __init__(self, mixture: Mixture, number: int) -> None:
        self.size, self.shuffle = mixture.sources[number].size, mixture.shuffle
        self._key = (mixture.seed, number)
        self._whole, self._rest = divmod(self.size, CHUNK_DOCUMENTS)
        self.chunks = self._whole + (self._rest > 0)

    def ordinal(self, cursor: int) -> int:
        """The number, over all epochs, of the chunk that holds document `cursor` of all that the source gives."""
        epoch, place = divmod(cursor, self.size)
        short = self._short(epoch)
        slot = min(place // CHUNK_DOCUMENTS, short)
        if place >= short * CHUNK_DOCUMENTS + self._rest:
            slot = (place - self._rest) // CHUNK_DOCUMENTS + (self._rest > 0)
        return epoch * self.chunks + slot

    def starts(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """The cursor of the first document of the chunks at `slots` [n] of an epoch, [n] int64."""
        missing = CHUNK_DOCUMENTS - self._rest if self._rest else 0
        return epoch * self.size + slots * CHUNK_DOCUMENTS - missing * (slots > self._short(epoch))

    def numbers(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """The chunks at `slots` [n] of an epoch, [n] int64."""
        short = self._short(epoch)
        places = slots - (slots > short) * (self._rest > 0)
        if not self.shuffle:
            return places
        found = np.full_like(places, self._whole)
        whole = (slots != short) if self._rest else np.ones(len(slots), bool)
        found[whole] = feistel(places[whole], self._whole, *self._key, epoch, _CHUNK_DRAW)
        return found

    def _short(self, epoch: int) -> int:
        """The slot of the short chunk; behind all others where there is none, or where nothing is shuffled."""
        return hash_key(*self._key, epoch, _SHORT_DRAW) % (self._whole + 1) if self.shuffle and self._rest else self._whole
