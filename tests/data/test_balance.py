"""Even work for the ranks of a step."""

from __future__ import annotations

import itertools
import random

import pytest

from fusiontrain.data.balance import balance


def loads(costs, shares):
    return [sum(costs[item] for item in share) for share in shares]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_every_item_once_and_equal_counts(world_size):
    costs = [random.Random(world_size).randrange(1000) for _ in range(12)]
    shares = balance(costs, world_size)
    assert {len(share) for share in shares} == {12 // world_size}
    assert sorted(itertools.chain(*shares)) == list(range(12))
    assert shares == balance(list(costs), world_size)


def test_small_cases_are_near_the_best_of_all():
    draw = random.Random(0)
    for _ in range(30):
        costs = [draw.randrange(1, 100) for _ in range(8)]
        best = min(max(sum(half), sum(costs) - sum(half)) for half in itertools.combinations(costs, 4))
        assert max(loads(costs, balance(costs, 2))) <= best * 1.05


def test_64_ranks_with_4_sequences_are_within_two_percent():
    for seed in range(10):
        draw = random.Random(seed)
        costs = [256 * draw.choice(range(4, 24)) for _ in range(256)]
        found = loads(costs, balance(costs, 64))
        assert max(found) / (sum(found) / 64) <= 1.02


def test_items_without_cost_and_counts_that_do_not_divide():
    assert [len(share) for share in balance([0] * 6, 3)] == [2, 2, 2]
    with pytest.raises(ValueError, match="evenly"):
        balance([1, 2, 3], 2)
