"""Permutations that take no memory: any place of a shuffled epoch follows from its number alone.

A keyed Feistel network is a bijection of the numbers below a power of 4; walking its cycles until a number falls below `size` makes it one of
the numbers below `size` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Integers only, so every machine agrees.
"""

from __future__ import annotations

import numpy as np

from fusiontrain.utils.keyed import GOLDEN_GAMMA, MULTIPLIERS, SHIFTS, hash_key

ROUNDS = 6
CHUNK_DOCUMENTS = 32
"""Neighbours in a shard that stay near each other in an epoch, so that a cold disk is read in runs."""

GROUP_CHUNKS = 64
"""Chunks whose documents are shuffled together: what a shuffle buffer of 2,048 documents would hold, without the buffer."""

_CHUNK_DRAW, _GROUP_DRAW, _ROTATION_DRAW = 21, 22, 23


def feistel(places: np.ndarray, size: int, *key: int) -> np.ndarray:
    """The images of `places` [n] under the key's permutation of range(size). [n] int64. Costs O(n), whatever the size.

    Raises ValueError for a place outside range(size).
    """
    values = np.asarray(places, np.int64)
    if len(values) and not (values.min() >= 0 and values.max() < size):
        raise ValueError(f"places from {values.min()} to {values.max()}: must lie in range({size})")
    half = max(1, -(-max(size - 1, 1).bit_length() // 2))  # bits of each half: 4 ** half >= size
    keys = [hash_key(*key, number) for number in range(ROUNDS)]
    result = _rounds(values.astype(np.uint64), half, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _rounds(result[outside], half, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def epoch_order(places: np.ndarray, size: int, *key: int) -> np.ndarray:
    """The documents at `places` [n] of an epoch over `size` documents. [n] int64; a bijection of range(size) for every key.

    Chunks of CHUNK_DOCUMENTS neighbours are permuted, then documents inside a group of GROUP_CHUNKS chunks. Where the first chunk begins is
    drawn too, so the documents that are left over at the end (fewer than a chunk) are others in each epoch.
    """
    places = np.asarray(places, np.int64)
    group_size = CHUNK_DOCUMENTS * GROUP_CHUNKS
    groups = places // group_size
    shuffled = np.empty_like(places)
    for group in np.unique(groups).tolist():
        first = group * group_size
        mine = groups == group
        shuffled[mine] = first + feistel(places[mine] - first, min(group_size, size - first), *key, _GROUP_DRAW, group)
    slots, rest = np.divmod(shuffled, CHUNK_DOCUMENTS)
    whole = slots < size // CHUNK_DOCUMENTS  # the left-over chunk keeps its place
    slots[whole] = feistel(slots[whole], size // CHUNK_DOCUMENTS, *key, _CHUNK_DRAW)
    return (slots * CHUNK_DOCUMENTS + rest + hash_key(*key, _ROTATION_DRAW) % size) % size


def _rounds(values: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    """The Feistel network on numbers of 2 * half bits, [n] uint64."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + np.uint64(key)) & mask)
    return (left << shift) | right


def _mix(state: np.ndarray) -> np.ndarray:
    """splitmix64 of [n] uint64, as `utils.keyed` has it for one integer."""
    state = state + np.uint64(GOLDEN_GAMMA)
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(multiplier)
    return state ^ (state >> np.uint64(SHIFTS[2]))
