"""A few steps of a trainer, watched: some to warm up, some timed, one more for its memory."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, record_function, schedule

from fusiontrain.models.flops import Flops, Part, flops_by_part, recomputed_by_part, six_nd
from fusiontrain.models.fusion import FusionModel
from fusiontrain.train.profile.compilation import Compilation, compilation
from fusiontrain.train.profile.host import STEP
from fusiontrain.train.profile.memory import MemoryWatch, StepMemory
from fusiontrain.train.profile.parts import DATA_WAIT, whole
from fusiontrain.train.profile.scopes import Scopes
from fusiontrain.train.profile.timeline import Divided, divide
from fusiontrain.train.profile.trace import read_trace
from fusiontrain.train.trainer import Trainer
from fusiontrain.types import Batch


@dataclass(frozen=True)
class RankProfile:
    """What one rank saw. flops, recomputed and tokens: of one step on average, this rank's. six_nd: as papers would bill it. save_seconds: of one checkpoint.
    compiled: while warming up, and then. trace: name of the file."""

    rank: int
    divided: Divided
    flops: dict[Part, Flops]
    recomputed: dict[Part, int]
    six_nd: float
    tokens: dict[str, float]
    save_seconds: float
    memory: StepMemory
    warmed_up: Compilation
    compiled: Compilation
    trace: str


class Window:
    """Stands between a trainer and its loader, so it sees where steps begin. `run` trains warmup + steps + 1 steps."""

    def __init__(self, trainer: Trainer, warmup: int, steps: int, folder: Path) -> None:
        self.trainer, self.warmup, self.steps = trainer, warmup, steps
        self.trace = folder / f"trace-rank-{trainer.ranks.rank}.json"
        self.scopes = Scopes(trainer)
        self.memory = MemoryWatch(trainer, folder)
        self._load: Callable[[Any], Iterator[Any]] = trainer.loader.iterate
        self._undo = contextlib.ExitStack()
        self._begun = 0
        self._batches: list[Sequence[Batch]] = []
        self._save_seconds = 0.0
        self._found: StepMemory | None = None
        self._compiled = [compilation()]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (trainer.ranks.device.type == "cuda")
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=schedule(wait=warmup - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(self.trace)),
            acc_events=True,
        )

    def run(self) -> RankProfile:
        """Train, and return what was seen. All ranks call this together."""
        save = self.trainer._save

        def timed_save(values: Mapping[str, Any]) -> None:
            self._found = self.memory.end()
            started = time.perf_counter()
            save(values)
            self._save_seconds = time.perf_counter() - started

        with self._undo, mock.patch.object(self.trainer, "_save", timed_save), mock.patch.object(self.trainer.loader, "iterate", self._iterate):
            self._profiler.start()
            self.trainer.run()
        return self._result(divide(read_trace(self.trace), self.scopes.calls))

    @property
    def first_batch(self) -> Batch:
        """Of the profiled ones."""
        return self._batches[0][0]

    def _iterate(self, start: Any) -> Iterator[Any]:
        batches = self._load(start)
        while True:
            self._begin_step()
            with self.scopes.open(whole(DATA_WAIT)):
                item = next(batches)
            if self.warmup < self._begun <= self.warmup + self.steps:
                self._batches.append(item[0])
            yield item

    def _begin_step(self) -> None:
        """Step number `_begun` is over, and the next one begins."""
        self._undo.close()
        if self._begun:
            self._profiler.step()
        if self._begun == self.warmup:
            self._compiled.append(compilation())
        if self._begun == self.warmup + self.steps:
            self._profiler.stop()
            self._compiled.append(compilation())
            self.memory.begin()
        else:
            self._undo.enter_context(self.scopes.installed())
            self._undo.enter_context(record_function(f"{STEP} {self._begun}"))
        self._begun += 1

    def _result(self, divided: Divided) -> RankProfile:
        trainer, model = self.trainer, self.trainer.model
        assert isinstance(model, FusionModel) and self._found is not None
        batches = [batch for step in self._batches for batch in step]
        parallel = trainer.config.parallel
        full = parallel.activation_checkpointing == "full"
        forward, backward, again, tokens = Counter[Part](), Counter[Part](), Counter[Part](), Counter[str]()
        for batch in batches:
            for part, flops in flops_by_part(model, batch).items():
                forward[part] += flops.forward
                backward[part] += flops.backward
            again.update(recomputed_by_part(model, batch, parallel.activation_checkpointing_every) if full else {})
            tokens.update(batch.token_counts)
        before, warm, after = self._compiled
        return RankProfile(
            rank=trainer.ranks.rank,
            divided=divided,
            flops={part: Flops(forward[part] // self.steps, backward[part] // self.steps) for part in forward},
            recomputed={part: count // self.steps for part, count in again.items()},
            six_nd=sum(six_nd(model, batch) for batch in batches) / self.steps,
            tokens={name: count / self.steps for name, count in tokens.items()},
            save_seconds=self._save_seconds,
            memory=self._found,
            warmed_up=warm - before,
            compiled=after - warm,
            trace=self.trace.name,
        )
