"""Whole runs in a test's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fusiontrain.config.schema import Config
from fusiontrain.parallel.mesh import process_group, read_ranks
from fusiontrain.train.build import build_trainer
from fusiontrain.train.signals import StopRequest
from fusiontrain.train.trainer import Trainer


class Recorder:
    """A reporter that keeps what it is told, and can act on a step. due: the steps that are to be shown."""

    def __init__(self, act: Callable[[Mapping[str, Any]], None] = lambda values: None) -> None:
        self.act = act
        self.events: list[str] = []
        self.due: list[int] = []

    def started(self, step: int, steps: int, run_dir: Path) -> None:
        self.events.append(f"from {step} to {steps}")

    def step(self, values: Mapping[str, Any], due: bool) -> None:
        self.due += [values["step"]] * due
        self.act(values)

    def indexing(self, done: int, total: int) -> None:
        pass

    def event(self, text: str) -> None:
        self.events.append(text)


@contextmanager
def trainer_of(config: Config, reporter: Recorder | None = None, stop: StopRequest | None = None) -> Iterator[Trainer]:
    """A trainer on the ranks of this process's group, or alone where there is none, until the end of the context."""
    ranks = read_ranks() if torch.distributed.is_initialized() else read_ranks({})
    with process_group(ranks, config.parallel):
        trainer = build_trainer(config, ranks, Recorder() if reporter is None else reporter, StopRequest() if stop is None else stop)
        try:
            yield trainer
        finally:
            trainer.close()
