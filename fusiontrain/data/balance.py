"""Which rank computes which sequence of a step: equal counts, even work. It changes who sees a sequence, never what a step holds."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balance(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Indices of `costs`, as many for each rank, so that the ranks' sums are near each other.

    The dearest goes first, each to the cheapest rank with room (LPT), and then the dearest rank swaps items with cheaper ones while that brings
    them nearer. Ties go by index, so all ranks find the same. Raises ValueError where the ranks cannot get equal counts.
    """
    if len(costs) % world_size:
        raise ValueError(f"{len(costs)} items: cannot be shared evenly by {world_size} ranks")
    per_rank = len(costs) // world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    cheapest_first = [(0, rank) for rank in range(world_size)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(cheapest_first)
        shares[rank].append(item)
        if len(shares[rank]) < per_rank:
            heapq.heappush(cheapest_first, (load + costs[item], rank))
    loads = [sum(costs[item] for item in share) for share in shares]
    for _ in range(2 * world_size):
        high = loads.index(max(loads))
        if not any(_swap(costs, shares, loads, high, low) for low in sorted(range(world_size), key=lambda rank: (loads[rank], rank))):
            break
    return [sorted(share) for share in shares]


def _swap(costs: Sequence[int], shares: list[list[int]], loads: list[int], high: int, low: int) -> bool:
    """Swap the two items that bring the loads of two ranks nearest to each other; False where no swap brings them nearer."""
    gap = loads[high] - loads[low]
    if gap <= 1:
        return False
    distance, i, j = min((abs(gap - 2 * (costs[mine] - costs[theirs])), i, j) for i, mine in enumerate(shares[high]) for j, theirs in enumerate(shares[low]))
    if distance >= gap:
        return False
    moved = costs[shares[high][i]] - costs[shares[low][j]]
    shares[high][i], shares[low][j] = shares[low][j], shares[high][i]
    loads[high] -= moved
    loads[low] += moved
    return True
