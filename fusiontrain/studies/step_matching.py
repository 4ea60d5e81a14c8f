"""Step matching (Mixture-of-Transformers, arXiv 2411.04996, section 3): what share of the dense model's steps another model needs for the same loss.

For every step t of the dense run, the step s(t) at which the other run reaches the loss that the dense one has at t. The slope of s over t is the
share of steps, and of FLOPs where a step costs both the same. The paper does not say how it fits; here:

1. both loss curves are smoothed by a centred moving average over `SMOOTHING` of the run,
2. and made never to rise (the lowest loss so far), so that each loss is reached once;
3. the first `DROPPED` of the dense run is left out; so are its steps that bring no new lowest loss, without which a run would not match itself,
   and losses that the other run never reaches, which are counted: where there are any, the slope flatters it;
4. the slope is the least-squares line through the origin: sum(t s) / sum(t t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMOOTHING = 0.05
DROPPED = 0.05
FIT = f"least squares through the origin; moving average over {SMOOTHING:.0%} of the run, steps with a new lowest loss, first {DROPPED:.0%} dropped"


@dataclass(frozen=True)
class StepMatch:
    """slope: None where the other run reaches none of the dense run's losses. steps [n], matched [n]: t and s(t) of the losses that it reaches.
    reached: their share of those that were asked for."""

    slope: float | None
    reached: float
    steps: np.ndarray
    matched: np.ndarray


def smooth(losses: Sequence[float]) -> np.ndarray:
    """Moving average of a curve [n], centred, over fewer steps at its ends; then the lowest value so far."""
    curve = np.asarray(losses, dtype=np.float64)
    half = max(1, round(len(curve) * SMOOTHING)) // 2
    total = np.concatenate([[0.0], np.cumsum(curve)])
    at = np.arange(len(curve))
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(curve))
    return np.minimum.accumulate((total[end] - total[first]) / (end - first))


def match_steps(dense: Sequence[float], other: Sequence[float]) -> StepMatch:
    """Losses of steps 1, 2, ... of the dense run and of the other one; the numbers of steps may differ."""
    target, curve = smooth(dense), smooth(other)
    steps = np.arange(1, len(target) + 1)
    kept = (steps > DROPPED * len(target)) & (np.diff(target, prepend=np.inf) < 0)
    steps, target = steps[kept], target[kept]
    matched = np.searchsorted(-curve, -target) + 1  # the first step with a loss no higher
    reached = matched <= len(curve)
    steps, matched = steps[reached], matched[reached]
    slope = float((steps * matched).sum() / (steps * steps).sum()) if len(steps) else None
    return StepMatch(slope, float(reached.mean()) if len(reached) else 0.0, steps, matched)
