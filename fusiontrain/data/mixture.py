"""Which document comes at which place of the endless stream of documents: exact proportions, no state."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from fusiontrain.utils.keyed import GOLDEN_GAMMA, MULTIPLIERS, SHIFTS, hash_key


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of `count` numbers that is a function of the key: the order of their hashes (splitmix64). [count] int64."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA) + np.uint64(hash_key(*key))
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(multiplier)
    return np.argsort(state ^ (state >> np.uint64(SHIFTS[2])), kind="stable")


class Mixture:
    """Sources of given sizes, mixed by weight (shares of documents), each visited once per epoch of its own.

    At place n of the stream, source s has given floor(w_s * n / sum of w) documents, in exact fractions of the weights as they are written.
    So no source ever goes back, and a window of n places holds n documents but for fewer than the number of sources.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool) -> None:
        fractions = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth, not the float nearest to it
        total = sum(fractions)
        self.shares = [fraction / total for fraction in fractions]
        self.sizes, self.seed, self.shuffle = tuple(sizes), seed, shuffle
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def given(self, source: int, count: int) -> int:
        """Documents that source has given before place `count` of the stream."""
        share = self.shares[source]
        return count * share.numerator // share.denominator

    def window(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """(source, epoch, sample) of the documents at places `first` .. `first + count - 1` of the stream, source by source."""
        documents = []
        for source in range(len(self.sizes)):
            for cursor in range(self.given(source, first), self.given(source, first + count)):
                epoch, place = divmod(cursor, self.sizes[source])
                documents.append((source, epoch, int(self._order(source, epoch)[place])))
        return documents

    def _order(self, source: int, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return range(self.sizes[source])  # type: ignore[return-value]
        key = (source, epoch)
        if key not in self._orders:
            if len(self._orders) > 2 * len(self.sizes):
                self._orders.clear()
            self._orders[key] = permutation(self.sizes[source], self.seed, source, epoch)
        return self._orders[key]
