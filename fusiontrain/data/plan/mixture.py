"""Which document comes at which place of the stream of documents: exact proportions, no state."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fusiontrain.data.plan.permutation import epoch_order
from fusiontrain.utils.errors import UserError


@dataclass(frozen=True)
class MixedSource:
    """A source as the mixture sees it.

    size: documents. weights: (first place of the stream, weight) in rising order, the first at place 0. max_epochs: the source leaves the
    mixture after so many; None for never.
    """

    size: int
    weights: tuple[tuple[int, Fraction], ...]
    max_epochs: int | None = None

    @property
    def limit(self) -> int | None:
        """Documents that it may give in all."""
        return None if self.max_epochs is None else self.max_epochs * self.size

    def weight(self, place: int) -> Fraction:
        """Its weight at a place of the stream."""
        return self.weights[bisect.bisect_right(self.weights, place, key=lambda entry: entry[0]) - 1][1]


@dataclass(frozen=True)
class _Stretch:
    """Places from `start` on, over which the shares stay the same, and what every source has given before."""

    start: int
    given: tuple[int, ...]
    shares: tuple[Fraction, ...]


class Mixture:
    """Sources mixed by weight (shares of documents), each visited once per epoch of its own.

    After n places of a stretch with constant weights, source s has given floor(w_s * n / sum of w) documents of it, in exact fractions. So
    no source ever goes back, and n places hold n documents but for fewer than the number of sources. A stretch ends where a schedule changes
    a weight or a source is used up; there are few of them, so any place is found at once. `end`: the place where all are used up, or None.
    """

    def __init__(self, sources: Sequence[MixedSource], seed: int, shuffle: bool) -> None:
        self.sources, self.seed, self.shuffle = tuple(sources), seed, shuffle
        self.end: int | None = None
        self._stretches: list[_Stretch] = []
        self._plan_stretches()

    def given(self, source: int, place: int) -> int:
        """Documents that a source has given before a place of the stream."""
        stretch = self._stretches[bisect.bisect_right(self._stretches, place, key=lambda s: s.start) - 1]
        return stretch.given[source] + _floor(stretch.shares[source], place - stretch.start)

    def window(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """(source, epoch, sample) of the documents at places `first` .. `first + count - 1` of the stream, source by source."""
        documents: list[tuple[int, int, int]] = []
        for number, source in enumerate(self.sources):
            cursors = np.arange(self.given(number, first), self.given(number, first + count), dtype=np.int64)
            epochs, places = np.divmod(cursors, source.size)
            for epoch in np.unique(epochs).tolist():
                samples = places[epochs == epoch]
                if self.shuffle:
                    samples = epoch_order(samples, source.size, self.seed, number, epoch)
                documents += [(number, epoch, sample) for sample in samples.tolist()]
        return documents

    def _plan_stretches(self) -> None:
        place, given = 0, [0] * len(self.sources)
        while True:
            left = [source.limit is None or count < source.limit for source, count in zip(self.sources, given, strict=True)]
            weights = [source.weight(place) if more else Fraction(0) for source, more in zip(self.sources, left, strict=True)]
            total = sum(weights)
            if not total and any(left):
                raise UserError(f"data.sources: every source that is not used up has weight 0 from document {place} on; raise one, or max_epochs")
            shares = tuple(weight / total if total else Fraction(0) for weight in weights)
            self._stretches.append(_Stretch(place, tuple(given), shares))
            if not total:
                self.end = place
                return
            borders = [start for source in self.sources for start, _ in source.weights if start > place]
            for source, share, count in zip(self.sources, shares, given, strict=True):
                if source.limit is not None and share:
                    borders.append(place + -(-(source.limit - count) * share.denominator // share.numerator))
            if not borders:
                return
            given = [self.given(number, min(borders)) for number in range(len(self.sources))]
            place = min(borders)


def _floor(share: Fraction, count: int) -> int:
    return count * share.numerator // share.denominator
