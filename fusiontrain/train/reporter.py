"""Who tells a person how a run goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Reporter(Protocol):
    """Told by the trainer, which itself prints nothing."""

    def indexing(self, done: int, total: int) -> None:
        """After every shard that is indexed before the run can start."""

    def started(self, step: int, steps: int, run_dir: Path) -> None: ...

    def step(self, values: Mapping[str, Any], due: bool) -> None:
        """After every step, with its metrics; `due` every `train.log_every_steps`."""

    def event(self, text: str) -> None:
        """What happens now and then: an evaluation, a checkpoint, a skipped update."""
