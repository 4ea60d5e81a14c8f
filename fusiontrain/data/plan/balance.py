"""Which rank computes which sequence of a step: equal counts, even work. It changes who sees a sequence, never what a step holds."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

SCALE = 1 << 40
NEAR = SCALE + SCALE // 200
"""A step takes as long as its worst rank: half a percent above the mean is not worth more search."""

SWAPS_PER_RANK, PARTNERS = 4, 64


def balance(costs: Sequence[Sequence[int]], world_size: int) -> list[list[int]]:
    """Indices of `costs`, as many for each rank, so that the ranks' sums are near each other in every one of the kinds of cost.

    costs [n][k]: of each item, by kind; the first is what decides at the beginning. The dearest goes first, each to the cheapest rank with room
    (LPT); then the rank that is furthest above the mean in any kind swaps items with others while that brings both nearer to it. Integers alone
    and ties by index, so all ranks find the same. Raises ValueError where the ranks cannot get equal counts.
    """
    if len(costs) % world_size:
        raise ValueError(f"{len(costs)} items: cannot be shared evenly by {world_size} ranks")
    shares = _longest_first([item[0] for item in costs], world_size)
    if len(costs) > world_size > 1:
        _swap(_scaled(costs), shares)
    return [sorted(share) for share in shares.tolist()]


def _longest_first(costs: Sequence[int], world_size: int) -> np.ndarray:
    """Items of each rank, [world_size, n / world_size]."""
    per_rank = len(costs) // world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    cheapest_first = [(0, rank) for rank in range(world_size)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(cheapest_first)
        shares[rank].append(item)
        if len(shares[rank]) < per_rank:
            heapq.heappush(cheapest_first, (load + costs[item], rank))
    return np.array(shares, np.int64)


def _scaled(costs: Sequence[Sequence[int]]) -> np.ndarray:
    """The costs [n, k] int64 in parts of SCALE of the sum of their kind, so that kinds can be compared."""
    totals = [max(1, sum(kind)) for kind in zip(*costs, strict=True)]
    return np.array([[cost * SCALE // total for cost, total in zip(item, totals, strict=True)] for item in costs], np.int64)


def _swap(costs: np.ndarray, shares: np.ndarray) -> None:
    """Swap items of `shares` in place until all ranks are near the mean, the worst one cannot be bettered, or there were many swaps."""
    world_size = len(shares)
    loads = costs[shares].sum(axis=1)  # [world_size, k]
    for _ in range(SWAPS_PER_RANK * world_size):
        worst = loads.max(axis=1)
        high = int(worst.argmax())
        cheapest_first = worst.argsort(kind="stable")
        if worst[high] * world_size <= NEAR or not any(
            _swap_with(costs, shares, loads, high, cheapest_first[first : first + PARTNERS]) for first in range(0, world_size, PARTNERS)
        ):
            return


def _swap_with(costs: np.ndarray, shares: np.ndarray, loads: np.ndarray, high: int, others: np.ndarray) -> bool:
    """The swap of an item of rank `high` with one of the others that leaves the two ranks nearest to the mean; False where none betters `high`."""
    # What the two ranks would have after each swap, [mine, other, theirs].
    moved = costs[shares[high]][:, None, None] - costs[shares[others]][None]
    after = np.maximum((loads[high] - moved).max(axis=-1), (loads[others][:, None] + moved).max(axis=-1))
    mine, other, theirs = np.unravel_index(int(after.argmin()), after.shape)
    if after[mine, other, theirs] >= loads[high].max():
        return False
    low, change = others[other], moved[mine, other, theirs]
    loads[high] -= change
    loads[low] += change
    shares[high, mine], shares[low, theirs] = shares[low, theirs], shares[high, mine]
    return True
