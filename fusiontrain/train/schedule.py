"""The learning rate as a pure function of the step: linear warm-up, then a cosine down to its final value."""

from __future__ import annotations

import math

from fusiontrain.config.schema import OptimizerConfig


def learning_rate(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (1 is the first, `total_steps` the last).

    Step n of `warmup_steps` gets n / warmup_steps of the peak, so the first step already learns. The cosine then falls from the peak
    to `final_learning_rate`, which the last step gets exactly and later steps keep.
    """
    if step <= optimizer.warmup_steps:
        return optimizer.learning_rate * step / optimizer.warmup_steps
    decay_steps = max(1, total_steps - optimizer.warmup_steps)
    progress = min(1.0, (step - optimizer.warmup_steps) / decay_steps)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.final_learning_rate + share * (optimizer.learning_rate - optimizer.final_learning_rate)
