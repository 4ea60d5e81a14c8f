"""Which checkpoints of a run stay: the newest ones, those of round steps, and the best one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusiontrain.config.schema import CheckpointConfig


@dataclass(frozen=True)
class Retention:
    """last: how many of the newest stay. every: so do those whose step it divides. best: and the one whose metric of this name is lowest."""

    last: int
    every: int | None = None
    best: str | None = None

    @classmethod
    def of(cls, config: CheckpointConfig) -> Retention:
        return cls(config.keep_last, config.keep_every, config.keep_best)


def superfluous(checkpoints: Sequence[tuple[int, Path]], keep: Retention, metrics_of: Callable[[Path], Mapping[str, float]]) -> list[Path]:
    """The ones of `checkpoints` (step, folder), oldest first, that `keep` has no reason for. A checkpoint without the metric is never the best."""
    kept = {path for _, path in checkpoints[-keep.last :]}
    if keep.every is not None:
        kept |= {path for step, path in checkpoints if step % keep.every == 0}
    if keep.best is not None:
        values = [(metrics_of(path).get(keep.best, math.inf), -step, path) for step, path in checkpoints]
        kept |= {path for value, _, path in sorted(values)[:1] if value < math.inf}
    return [path for _, path in checkpoints if path not in kept]
