"""Keyed noise: normal, independent, and a function of (key, element) alone."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fusiontrain.objectives.noise import keyed_normal
from fusiontrain.utils.keyed import GOLDEN_GAMMA, _mix


def noise(keys: list[int], grids: list[tuple[int, int]], channels: int) -> torch.Tensor:
    image_ids = torch.repeat_interleave(torch.tensor([rows * columns for rows, columns in grids], dtype=torch.int64))
    return keyed_normal(torch.tensor(keys, dtype=torch.int64), image_ids, channels, tuple(grids))


def by_loops(key: int, element: int) -> float:
    """The same number in Python's own integers and floats."""
    bits = _mix((_mix(key % 2**64) + element * GOLDEN_GAMMA) % 2**64)
    radius, angle = ((bits >> 32) + 0.5) / 2**32, (bits & 0xFFFFFFFF) / 2**32
    return math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)


@pytest.mark.parametrize("key", [0, 1, 2**62 + 12345, 2**63 - 1, -5])
def test_equals_a_loop_in_plain_integers(key: int) -> None:
    actual = noise([key], [(3, 4)], 5).flatten().tolist()
    assert actual == pytest.approx([by_loops(key, element) for element in range(60)], rel=1e-6, abs=1e-7)


def test_values_never_change() -> None:
    assert noise([7], [(1, 3)], 1).flatten().tolist() == pytest.approx([-0.8075450, 0.2792164, 0.2760165], abs=1e-6)


def test_the_same_in_any_batch_and_order() -> None:
    draw = random.Random(0)
    keys = [draw.getrandbits(63) for _ in range(7)]
    grids = [(draw.randint(1, 5), draw.randint(1, 5)) for _ in range(7)]
    alone = [noise([key], [grid], 13) for key, grid in zip(keys, grids, strict=True)]
    for _ in range(5):
        order = draw.sample(range(7), draw.randint(1, 7))
        together = noise([keys[i] for i in order], [grids[i] for i in order], 13)
        assert torch.equal(together, torch.cat([alone[i] for i in order]))


def test_stateless() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = noise([3], [(4, 4)], 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(noise([3], [(4, 4)], 8), first)


@pytest.mark.parametrize("first_key", [0, 1 << 40])
def test_moments_are_those_of_a_normal(first_key: int) -> None:
    x = noise(list(range(first_key, first_key + 16)), [(64, 64)] * 16, 16).double()
    spread = x.numel() ** -0.5  # standard error of a mean of unit-variance numbers
    assert abs(x.mean()) < 4 * spread
    assert abs(x.var() - 1) < 4 * math.sqrt(2) * spread
    assert abs(x.pow(3).mean()) < 4 * math.sqrt(15) * spread
    assert abs(x.pow(4).mean() - 3) < 4 * math.sqrt(96) * spread
    for edge in (-2.0, -1.0, 0.0, 1.0, 2.0):
        expected = 0.5 * (1 + math.erf(edge / math.sqrt(2)))
        assert abs((x < edge).double().mean() - expected) < 4 * 0.5 * spread


def test_neighbouring_keys_channels_and_patches_are_independent() -> None:
    x = noise(list(range(64)), [(16, 16)] * 64, 16).view(64, 256, 16)
    for other in (x.roll(1, 0), x.roll(1, 1), x.roll(1, 2), x.flatten().roll(16 * 256 + 1).view_as(x)):
        assert abs((x * other).mean()) < 4 * x.numel() ** -0.5
        assert abs(((x.square() - 1) * (other.square() - 1)).mean()) < 8 * x.numel() ** -0.5
    assert len(x.flatten().unique()) > 0.99 * x.numel()


def test_no_images() -> None:
    out = noise([], [], 5)
    assert out.shape == (0, 5) and out.dtype == torch.float32


@pytest.mark.parametrize(("keys", "grids", "tokens"), [([1, 2], [(2, 2)], 4), ([1], [(2, 2)], 5)])
def test_arguments_that_do_not_agree_are_refused(keys: list[int], grids: list[tuple[int, int]], tokens: int) -> None:
    with pytest.raises(ValueError, match="keyed_normal"):
        keyed_normal(torch.tensor(keys), torch.zeros(tokens, dtype=torch.int64), 3, tuple(grids))
