"""Even work for the ranks of a step."""

from __future__ import annotations

import itertools
import random

import pytest

from fusiontrain.data.plan.balance import balance


def loads(costs, shares, kind=0):
    return [sum(costs[item][kind] for item in share) for share in shares]


def worst(costs, shares, kind):
    found = loads(costs, shares, kind)
    return max(found) * len(found) / sum(found)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_every_item_once_and_equal_counts(world_size):
    draw = random.Random(world_size)
    costs = [(draw.randrange(1000), draw.randrange(50)) for _ in range(12)]
    shares = balance(costs, world_size)
    assert {len(share) for share in shares} == {12 // world_size}
    assert sorted(itertools.chain(*shares)) == list(range(12))
    assert shares == balance(list(costs), world_size)


def test_small_cases_are_near_the_best_of_all():
    draw = random.Random(0)
    for _ in range(30):
        costs = [(draw.randrange(1, 100),) for _ in range(8)]
        whole = sum(cost for (cost,) in costs)
        best = min(max(sum(half), whole - sum(half)) for half in itertools.combinations([cost for (cost,) in costs], 4))
        assert max(loads(costs, balance(costs, 2))) <= best * 1.05


def test_two_kinds_of_cost_are_near_the_best_of_all():
    draw = random.Random(0)
    for _ in range(15):
        costs = [(draw.randrange(50, 100), draw.randrange(50, 100)) for _ in range(12)]

        def worse_kind(half, costs=costs):
            return max(worst(costs, [half, [i for i in range(12) if i not in half]], kind) for kind in (0, 1))

        best = min(map(worse_kind, itertools.combinations(range(12), 6)))
        assert worse_kind(balance(costs, 2)[0]) <= max(1.005, best) + 0.02


@pytest.mark.parametrize(("world_size", "per_rank"), [(64, 4), (8, 4), (64, 16), (256, 4)])
def test_image_tokens_and_whole_cost_are_both_within_two_percent(world_size, per_rank):
    """Sequences as packing makes them: 4 to 28 images of 256 tokens, and an attention area that grows with long documents."""
    for seed in range(5):
        draw = random.Random(seed)
        images = [256 * draw.choice(range(4, 29)) for _ in range(world_size * per_rank)]
        costs = [(image + draw.randrange(200, 900), image) for image in images]
        shares = balance(costs, world_size)
        assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
        assert max(worst(costs, shares, 0), worst(costs, shares, 1)) <= 1.02


def test_items_without_cost_and_counts_that_do_not_divide():
    assert [len(share) for share in balance([(0, 0)] * 6, 3)] == [2, 2, 2]
    with pytest.raises(ValueError, match="evenly"):
        balance([(1,), (2,), (3,)], 2)
