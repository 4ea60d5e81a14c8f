"""Step matching against curves whose answer is known, and against a loop that looks for each loss step by step."""

from __future__ import annotations

import numpy as np
import pytest

from fusiontrain.studies.step_matching import DROPPED, SMOOTHING, match_steps


def power_law(steps: int, pace: float) -> np.ndarray:
    """A loss that depends on pace * step alone: a run at twice the pace needs half the steps."""
    return 1 + (pace * np.arange(1, steps + 1)) ** -0.3


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_run_at_another_pace_needs_that_share_of_the_steps(share):
    match = match_steps(power_law(4000, 1.0), power_law(4000, 1 / share))
    assert match.slope == pytest.approx(share, rel=0.03)
    assert match.reached == 1.0


def test_the_same_run_has_slope_one_whatever_its_noise():
    losses = power_law(500, 1.0) + np.random.default_rng(0).normal(0, 0.05, 500)
    match = match_steps(losses, losses)
    assert match.slope == match.reached == 1.0
    assert len(match.steps) < 400, "some steps of a noisy run bring no lower loss"


def test_losses_that_are_never_reached_are_counted_and_left_out():
    match = match_steps(power_law(1000, 1.0), power_law(500, 1.0))
    assert match.reached == pytest.approx((500 - 1000 * DROPPED) / (1000 - 1000 * DROPPED), abs=0.03)
    assert match.slope == pytest.approx(1.0, abs=0.03)
    assert match_steps([1.0] * 100, [2.0] * 100).slope is None


def test_against_a_loop():
    rng = np.random.default_rng(1)
    dense, other = (power_law(300, pace) + rng.normal(0, 0.02, 300) for pace in (1.0, 2.5))
    window = round(300 * SMOOTHING) // 2
    curves = []
    for losses in (dense, other):
        averages = [np.mean(losses[max(0, i - window) : i + window + 1]) for i in range(300)]
        curves.append([min(averages[: i + 1]) for i in range(300)])
    points = []
    for step in range(int(300 * DROPPED) + 1, 301):
        wanted = curves[0][step - 1]
        if wanted == curves[0][step - 2]:
            continue
        later = next((i for i in range(300) if curves[1][i] <= wanted), None)
        if later is not None:
            points.append((step, later + 1))
    match = match_steps(dense, other)
    assert list(match.steps) == [step for step, _ in points]
    assert list(match.matched) == [place for _, place in points]
    assert match.slope == pytest.approx(sum(t * s for t, s in points) / sum(t * t for t, s in points), rel=1e-12)
