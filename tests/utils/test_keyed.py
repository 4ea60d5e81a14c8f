"""Keyed randomness: stable values, no structure between neighbouring keys."""

from __future__ import annotations

import itertools

import pytest

from fusiontrain.utils.keyed import hash_key, keyed_uniform

GOLDEN = {
    (): 5225608189600411232,
    (0,): 7659671524919085019,
    (1, 2): 6110094990724049267,
}


@pytest.mark.parametrize("keys", GOLDEN)
def test_values_never_change(keys: tuple[int, ...]) -> None:
    assert hash_key(*keys) == GOLDEN[keys]


def test_a_known_splitmix64_output() -> None:
    """The first output of splitmix64 seeded with 1234567, as published with Vigna's C code, is the mix of that seed."""
    from fusiontrain.utils.keyed import _mix

    assert _mix(1234567) == 6457827717110365317


def test_uniform_value_never_changes() -> None:
    assert keyed_uniform(3) == hash_key(3) // 1024 / 2**53
    assert 0.84942482 < keyed_uniform(3) < 0.84942483


def test_order_number_and_sign_of_keys_matter() -> None:
    keys = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (1, 2), (2, 1), (-1,), (1 << 40,)]
    assert len({hash_key(*key) for key in keys}) == len(keys)
    assert all(0 <= hash_key(*key) < 1 << 63 for key in keys)


def test_neighbouring_keys_are_uniform_and_uncorrelated() -> None:
    draws = [[keyed_uniform(a, b) for b in range(100)] for a in range(100)]
    flat = list(itertools.chain.from_iterable(draws))
    assert all(0 <= u < 1 for u in flat)
    counts = [sum(i / 10 <= u < (i + 1) / 10 for u in flat) for i in range(10)]
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 27.9  # chi-square, 9 degrees, 1 in 1000
    for shift in ((0, 1), (1, 0), (1, 1)):
        pairs = [(draws[a][b], draws[a + shift[0]][b + shift[1]]) for a in range(99) for b in range(99)]
        covariance = sum((x - 0.5) * (y - 0.5) for x, y in pairs) / len(pairs)
        assert abs(covariance * 12) < 4 / len(pairs) ** 0.5


def test_every_bit_is_used() -> None:
    hashes = [hash_key(i) for i in range(2000)]
    for bit in range(63):
        assert 800 < sum(h >> bit & 1 for h in hashes) < 1200
