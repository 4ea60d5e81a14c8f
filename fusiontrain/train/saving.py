"""When a run saves: at once, or in the background while it trains on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist

from fusiontrain.config.load import to_yaml
from fusiontrain.config.schema import Config
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.parallel.reduce import gather_floats
from fusiontrain.train.checkpoint import Tensors, save_checkpoint
from fusiontrain.train.retention import Retention
from fusiontrain.train.state import TrainState


class Saver:
    """Saves a run's tensors, at most one checkpoint at a time; all ranks call alike. It has a process group of its own, more patient than training's.

    With `checkpoint.asynchronous` a thread does it, while the loop goes on to the next forward and backward:
    those read the tensors, and only the optimizer changes them, so it waits until the thread has their bytes. What the loop stands still for is
    then the rest of that, if any. An error of the thread is raised by `wait`, on all ranks.
    """

    def __init__(
        self, config: Config, ranks: Ranks, tensors: Tensors, identity: Mapping[str, Any], optimizer: torch.optim.Optimizer,
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        """report: told of every checkpoint that is complete."""
        self._config, self._ranks, self._tensors, self._identity = config, ranks, tensors, identity
        self._stalled, self._written = 0.0, Event()
        self._pending: Future[str] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if config.checkpoint.asynchronous else None
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.checkpoint.timeout_seconds))
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._hold())
        self._report, self._without_best = report, False

    def save(self, state: TrainState, values: Mapping[str, Any]) -> None:
        """Save, or begin to, after waiting for a save that is under way. values: the step's metrics.

        Raises UserError where this save, or the one before it, cannot be written.
        """
        started = time.perf_counter()
        self.wait()
        if self._thread is None:
            self._report(self._write(state, values))
        else:
            self._written.clear()
            ready = torch.cuda.current_stream().record_event() if self._ranks.device.type == "cuda" else None
            self._pending = self._thread.submit(self._in_background, state, values, ready)
        self._say_if_never_best(state.step, values)
        self._stalled += time.perf_counter() - started

    def look(self) -> tuple[bool, float]:
        """Once a step: whether the save in the background has failed on this rank, and the seconds that the loop stood still since the last look.

        When one rank knows of a failure, all must call `wait`.
        """
        failed = self._pending is not None and self._pending.done() and self._pending.exception() is not None
        if self._pending is not None and self._pending.done() and not failed:
            self.wait()
        stalled, self._stalled = self._stalled, 0.0
        return failed, stalled

    def wait(self) -> None:
        """Wait for the save that is under way, if there is one; raises its UserError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._report(pending.result())

    def close(self) -> None:
        """Let the save under way end, well or not, and give back thread and group."""
        self._hook.remove()
        if self._thread is not None:
            self._thread.shutdown()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _say_if_never_best(self, step: int, values: Mapping[str, Any]) -> None:
        """Once: the user may believe that the best checkpoint is kept."""
        key = self._config.checkpoint.keep_best
        if key is not None and key not in _finite(values) and not self._without_best:
            self._without_best = True
            self._report(f"step {step}: has no value of checkpoint.keep_best={key}: its checkpoint is not kept as the best; those of evaluated steps may be")

    def _hold(self) -> None:
        """Before the optimizer changes the tensors: let the thread read them to the end."""
        if self._pending is not None:
            started = time.perf_counter()
            self._written.wait()
            self._stalled += time.perf_counter() - started

    def _in_background(self, state: TrainState, values: Mapping[str, Any], ready: torch.cuda.Event | None) -> str:
        try:
            if ready is None:
                return self._write(state, values)
            torch.cuda.set_device(self._ranks.device)  # every thread has its own
            with torch.cuda.stream(torch.cuda.Stream()):
                ready.wait()
                return self._write(state, values)
        finally:
            self._written.set()

    def _write(self, state: TrainState, values: Mapping[str, Any]) -> str:
        started, config = time.perf_counter(), self._config
        base = Path(config.model.base) if config.model.base is not None and config.checkpoint.frozen == "copy" else None
        path = save_checkpoint(
            Path(config.run.dir) / "checkpoints", state, self._tensors, self._identity, to_yaml(config), self._ranks, Retention.of(config.checkpoint),
            _finite(values), self._group, self._written.set, base,
        )  # fmt: skip
        return f"step {state.step}: saved {path} in {time.perf_counter() - started:.1f} s"


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def all_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether no rank holds an infinity or a NaN in its part of `tensors`. All ranks call this together."""
    shards = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors.values())
    extremes = (torch.stack(shard.aminmax()) for shard in shards if shard.is_floating_point() and shard.numel())
    broken = any(not pair.isfinite().all() for pair in extremes)  # one pass without a temporary: isfinite of all would take 25 times as long
    return not any(flag for (flag,) in gather_floats((float(broken),)))
