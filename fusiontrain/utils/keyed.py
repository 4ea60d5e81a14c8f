"""Numbers that are functions of their keys: every random choice of a run is one of these, so none depends on what was drawn before.

The mixing function is splitmix64's finalizer (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), in plain
integers: the same value on every machine, Python and library version. `objectives/noise.py` has the same mixing for whole tensors.
"""

from __future__ import annotations

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: successive multiples are spread evenly
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)

_MASK = (1 << 64) - 1


def hash_key(*keys: int) -> int:
    """A 63-bit number (0 <= h < 2^63, so it fits an int64) from any number of integers; their order and number matter.

    Each key counts modulo 2^64. Never change this function: shuffles, noise and initial weights of existing runs follow from it.
    """
    state = _mix(len(keys) + 1)
    for key in keys:
        state = _mix(state ^ _mix(int(key)))
    return state >> 1


def keyed_uniform(*keys: int) -> float:
    """A float in [0, 1), a multiple of 2^-53. Rounded to float32 it can become 1.0 (about once in 30 million draws)."""
    return (hash_key(*keys) >> 10) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + GOLDEN_GAMMA) & _MASK
    value = ((value ^ (value >> SHIFTS[0])) * MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> SHIFTS[1])) * MULTIPLIERS[1]) & _MASK
    return value ^ (value >> SHIFTS[2])
