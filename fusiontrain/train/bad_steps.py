"""What to do with a step that may harm the weights: one that is not finite, one that stands out, one that the user names.

A step stands out ("spike") when its loss or gradient norm lies more than `train.spike_sigmas` standard deviations above the mean of the last
`train.spike_window` steps. The rule sees only numbers that all ranks share, and its memory is part of the run's state: every rank, and a
resumed run, decides alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from fusiontrain.config.schema import TrainConfig
from fusiontrain.train.step import StepResult

FEWEST_STEPS = 16
"""Fewer than these say nothing about what is usual."""

WATCHED = ("loss", "grad_norm")


class Action(Enum):
    """What follows from a verdict."""

    UPDATE = "update"
    SKIP = "no update"
    STOP = "stop"
    PASS = "passed over"


@dataclass(frozen=True)
class Verdict:
    """An action and, for a step that is not as usual, a reason (nonfinite, spike) with words for it."""

    action: Action
    reason: str | None = None
    words: str = ""


USUAL = Verdict(Action.UPDATE)
PASSED_OVER = Verdict(Action.PASS, "skip_steps", "train.skip_steps names it: its data are passed over")


def judge(result: StepResult, history: Mapping[str, Sequence[float]], train: TrainConfig) -> Verdict:
    """The verdict on a step whose gradient is known and whose update is not made yet; `history` from `remember`."""
    if not result.finite:
        return Verdict(Action.SKIP, "nonfinite", f"loss {result.loss}, gradient norm {result.grad_norm}: no update")
    for name in WATCHED:
        value, limit = getattr(result, name), spike_limit(history.get(name, ()), train.spike_sigmas)
        if limit is not None and value > limit:
            action = {"log": Action.UPDATE, "skip": Action.SKIP, "stop": Action.STOP}[train.spike]
            said = f"{name.replace('grad_norm', 'gradient norm')} {value:.4g} is above {limit:.4g}, {train.spike_sigmas:g} sigmas over its mean"
            return Verdict(action, "spike", f"{said}: {action.value}")
    return USUAL


def spike_limit(values: Sequence[float], sigmas: float) -> float | None:
    """Mean + `sigmas` standard deviations of `values`; None where they are too few."""
    if len(values) < FEWEST_STEPS:
        return None
    mean = statistics.fmean(values)
    return mean + sigmas * statistics.pstdev(values, mean)


def remember(history: Mapping[str, Sequence[float]], result: StepResult, window: int) -> dict[str, list[float]]:
    """The last `window` finite values of loss and gradient norm. Spikes enter too, so that a lasting change soon is what is usual."""
    if not result.finite:
        return {name: list(values) for name, values in history.items()}
    return {name: [*history.get(name, ()), getattr(result, name)][-window:] for name in WATCHED}


def is_passed_over(step: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether `train.skip_steps` names step `step`, counted as in metrics.jsonl."""
    return any(first <= step <= last for first, last in ranges)
