"""What shows the numbers of a run besides its own files: TensorBoard, W&B, MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image


class Sink(Protocol):
    """One tracker. Every method may raise anything: who calls it counts that and goes on."""

    name: str
    """As `metrics.sinks` names it."""
    remote: bool
    """Whether a call may wait for a network, so that the training must not wait for the call."""

    def open(self, run_id: str | None, config: Mapping[str, Any]) -> str | None:
        """Begin a run, or go on with `run_id`; returns the run's id, to be given again on resume. config: nested plain values."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """values: by tag, finite."""

    def pictures(self, step: int, prompts: Sequence[str], pictures: Sequence[np.ndarray], sheet: Image.Image) -> None:
        """pictures: one of each prompt, [H, W, 3] uint8; sheet: all of them with their prompts as captions."""

    def text(self, step: int, tag: str, markdown: str) -> None: ...

    def close(self) -> None: ...
