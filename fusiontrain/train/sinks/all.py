"""All sinks of a run as one."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusiontrain.train.sinks.guard import Guard
from fusiontrain.train.sinks.mlflow_runs import MLflowRuns
from fusiontrain.train.sinks.sink import Sink
from fusiontrain.train.sinks.tensorboard import TensorBoard
from fusiontrain.train.sinks.weights_and_biases import WeightsAndBiases

EXTRAS = ("wandb", "mlflow")


def missing_packages(names: Sequence[str]) -> list[str]:
    """A sentence for each sink of `metrics.sinks` whose package is not installed."""
    return [
        f"metrics.sinks: {name}: is not installed: pip install 'fusiontrain[{name}]', or leave it out"
        for name in names
        if name in EXTRAS and importlib.util.find_spec(name) is None
    ]


class Sinks:
    """The sinks named in `metrics.sinks`, each behind its guard, of a run in `folder` that goes on after `step`."""

    def __init__(self, names: Sequence[str], folder: Path, step: int, config: Mapping[str, Any]) -> None:
        made: dict[str, Sink] = {"tensorboard": TensorBoard(folder, step), "wandb": WeightsAndBiases(folder), "mlflow": MLflowRuns(folder)}
        self._guards = [Guard(made[name], folder, step, config) for name in dict.fromkeys(names)]

    @property
    def failures(self) -> int:
        """Calls lost so far."""
        return sum(guard.failures for guard in self._guards)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for guard in self._guards:
            guard.scalars(step, values)

    def pictures(self, step: int, prompts: Sequence[str], pictures: Sequence[np.ndarray], sheet: Image.Image) -> None:
        for guard in self._guards:
            guard.pictures(step, prompts, pictures, sheet)

    def text(self, step: int, tag: str, markdown: str) -> None:
        for guard in self._guards:
            guard.text(step, tag, markdown)

    def news(self) -> list[str]:
        return [text for guard in self._guards for text in guard.news()]

    def close(self) -> None:
        for guard in self._guards:
            guard.close()
