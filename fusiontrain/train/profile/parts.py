"""What a step is divided into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fusiontrain.models.flops import ATTENTION, FEED_FORWARD, HEAD, PATCHER, PROJECTIONS

EMBEDDING, NORMS, IMAGE_LOSS = "embedding", "norms and residuals", "noise and image loss"
AUTOENCODER, COMPILED, MODEL = "image autoencoder", "compiled blocks", "rest of the model"
MODEL_GROUPS = (EMBEDDING, PROJECTIONS, ATTENTION, FEED_FORWARD, NORMS, PATCHER, AUTOENCODER, HEAD, IMAGE_LOSS, COMPILED, MODEL)
"""Groups of modules, in the order of a forward."""

DATA_WAIT, TO_DEVICE, SHARDING, COLLECTIVES = "data wait", "host to device", "sharding", "collectives exposed"
OPTIMIZER, METRICS, CHECKPOINT, IDLE = "optimizer", "metrics and log", "checkpoint", "idle"
OTHER_GROUPS = (DATA_WAIT, TO_DEVICE, SHARDING, COLLECTIVES, OPTIMIZER, METRICS, CHECKPOINT, IDLE)
"""sharding: what an engine does around its collectives, mostly copies. idle: nothing that has a name; on a GPU, no kernel runs, on a CPU, what the host
does between the parts."""

FORWARD, BACKWARD, RECOMPUTED, ONCE = "forward", "backward", "recomputed", "once"
PHASES = (FORWARD, BACKWARD, RECOMPUTED, ONCE)
"""once: parts that have no backward of their own."""

EVERYTHING = "all"
"""Modality of what serves all of them at once."""


class Cell(NamedTuple):
    """Where a moment of a step goes."""

    group: str
    modality: str
    phase: str


@dataclass(frozen=True)
class Call:
    """One call of a group of modules. forward and backward: how much of it each modality's rows are, in any unit."""

    group: str
    forward: Mapping[str, float]
    backward: Mapping[str, float]

    def cells(self, phase: str) -> dict[Cell, float]:
        """Shares of the call's time, which sum to one."""
        weights = {name: weight for name, weight in (self.backward if phase == BACKWARD else self.forward).items() if weight > 0}
        total = sum(weights.values())
        return {Cell(self.group, name, phase): weight / total for name, weight in weights.items()} if total else {Cell(self.group, EVERYTHING, phase): 1.0}


def whole(group: str, modality: str = EVERYTHING) -> Call:
    """A call that is not divided."""
    return Call(group, {modality: 1.0}, {modality: 1.0})
