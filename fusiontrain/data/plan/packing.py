"""Documents into sequences of one length: best fit decreasing, a window of documents at a time."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped so that no group's sum exceeds `capacity`.

    The longest goes first, each into the fullest group it still fits; ties go by index, so the result is a function of the lengths alone.
    Raises ValueError for a length above the capacity or below 1.
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, group), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"length {length}: must be from 1 to the capacity of {capacity}")
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            groups.append([index])
            free, group = capacity - length, len(groups) - 1
        else:
            free, group = rooms.pop(place)
            groups[group].append(index)
            free -= length
        if free:
            bisect.insort(rooms, (free, group))
    return groups
