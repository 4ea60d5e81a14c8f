"""Packed sequences by their number in a stream of documents that is packed a window at a time.

Any window is planned from its number alone; how many sequences the windows before it have is the one thing that takes time to find out, so an
`Anchor` in the resume state keeps that.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Anchor:
    """The number of a window and of its first sequence in the stream: where planning may begin instead of at 0."""

    window: int = 0
    sequence: int = 0


class Windows(Generic[T]):
    """The sequences of one stream. Its owner sees to it that one thread at a time asks.

    pack(window, first): the sequences of a window, whose first has that number; None behind the last window. kept: windows to hold in memory.
    """

    def __init__(self, pack: Callable[[int, int], Sequence[T] | None], kept: int) -> None:
        self._pack, self._kept = pack, kept
        self._first_window, self._firsts = 0, [0]  # firsts[i]: first sequence of window first_window + i
        self._cache: OrderedDict[int, Sequence[T] | None] = OrderedDict()

    def sequence(self, number: int) -> T | None:
        """The sequence of that number; None behind the last."""
        if not self.has(number):
            return None
        place = bisect.bisect_right(self._firsts, number) - 1
        packed = self._packed(self._first_window + place)
        assert packed is not None
        return packed[number - self._firsts[place]]

    def has(self, number: int) -> bool:
        """Whether there are so many sequences that one has this number; plans up to there."""
        if number < self._firsts[0]:
            self.begin_at(Anchor())
        while self._firsts[-1] <= number:
            packed = self._packed(self._first_window + len(self._firsts) - 1)
            if packed is None:
                return False
            self._firsts.append(self._firsts[-1] + len(packed))
        return True

    def end(self) -> int:
        """The number of all sequences of a stream that ends; plans all that is left of it."""
        while self.has(self._firsts[-1]):
            pass
        return self._firsts[-1]

    def anchor(self, number: int) -> Anchor:
        """Where planning may begin in order to reach a sequence, whose predecessor has been planned."""
        place = bisect.bisect_left(self._firsts, number)
        if place == len(self._firsts) or self._firsts[place] > number:
            place -= 1
        return Anchor() if place < 0 else Anchor(self._first_window + place, self._firsts[place])

    def windows_before(self, number: int) -> float:
        """How many windows, in parts of one, the sequences before that one have used; its predecessor has been planned."""
        anchor = self.anchor(number)
        packed = self._packed(anchor.window)
        return anchor.window + (number - anchor.sequence) / len(packed) if packed else anchor.window

    def begin_at(self, anchor: Anchor) -> None:
        """Forget the windows before an anchor that this very stream gave, perhaps in another process. Earlier sequences can still be asked for."""
        self._first_window, self._firsts = anchor.window, [anchor.sequence]

    def _packed(self, window: int) -> Sequence[T] | None:
        if window not in self._cache:
            self._cache[window] = self._pack(window, self._firsts[window - self._first_window])
            if len(self._cache) > self._kept:
                self._cache.popitem(last=False)
        self._cache.move_to_end(window)
        return self._cache[window]
