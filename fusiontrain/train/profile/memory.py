"""Memory over one step, by category: tensors followed one by one, on any device, at the peak of every part of the step."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fusiontrain.models.fusion import FusionModel
from fusiontrain.train import step
from fusiontrain.train.estimate.memory import MemoryTracker
from fusiontrain.train.metrics import memory_gib
from fusiontrain.train.trainer import Trainer

WEIGHTS, FROZEN, OPTIMIZER_STATE, GRADIENTS = "weights that train", "frozen weights and buffers", "optimizer state", "gradients"
OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class StepMemory:
    """moments: in order, bytes by category at the peak of each part of the step. process_gib: the most that the process has held so far: on a GPU what
    its allocator gave out, on a CPU all that is resident. snapshot: the allocator's history for pytorch.org/memory_viz, None on a CPU, which keeps none.
    """

    moments: dict[str, dict[str, float]]
    process_gib: float
    snapshot: str | None


class MemoryWatch:
    """Follows one step between `begin` and `end`."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder
        self._tracker = MemoryTracker[str]()
        self._owned: dict[str, set[int]] = {}
        self._undo = contextlib.ExitStack()

    def begin(self) -> None:
        """From here on, until `end`."""
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._undo.enter_context(self._tracker)
        self._undo.enter_context(self._phases())

    def end(self) -> StepMemory:
        """The step is over."""
        self._tracker.end()
        self._undo.close()
        held = self._held()
        moments = {moment: held | self._tracker.categories(moment, self._owned) for moment in self._tracker.peaks}
        return StepMemory(moments, memory_gib(self._trainer.ranks.device), self._snapshot())

    @property
    def _on_gpu(self) -> bool:
        return self._trainer.ranks.device.type == "cuda"

    @contextlib.contextmanager
    def _phases(self) -> Iterator[None]:
        """The model's own forward, and the gradients that pass its blocks, say which part of the step it is."""
        model, begin = self._trainer.model, self._tracker.begin
        assert isinstance(model, FusionModel)
        last = len(model.blocks) - 1

        def after_block(number: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
                if output[0].requires_grad:
                    output[0].register_hook(lambda _: begin(f"backward, block {number}"))

            return hook

        begin("before")
        hooks = [model.register_forward_pre_hook(lambda *_: begin("forward, embedding"))]
        for number, block in enumerate(model.blocks):
            hooks.append(block.register_forward_pre_hook(lambda *_, number=number: begin(f"forward, block {number}")))
            hooks.append(block.register_forward_hook(after_block(number)))
        hooks.append(model.text_objective.register_forward_pre_hook(lambda *_: begin("losses")))
        hooks.append(model.register_forward_hook(lambda *_: begin(f"backward, behind block {last}")))
        squared_norms = step.squared_norms

        def before_update(*args: Any, **kwargs: Any) -> Any:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self._owned[GRADIENTS] = self._tracker.serials(gradients)
            begin(OPTIMIZER)
            return squared_norms(*args, **kwargs)

        with mock.patch.object(step, "squared_norms", before_update):
            yield
        for hook in hooks:
            hook.remove()

    def _held(self) -> dict[str, float]:
        """Bytes that are there the whole step long."""
        model = self._trainer.model
        kinds: dict[str, list[torch.Tensor]] = {WEIGHTS: [p for p in model.parameters() if p.requires_grad]}
        kinds[FROZEN] = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        if self._trainer.zero is None:
            states = self._trainer.optimizer.state.values()
            kinds[OPTIMIZER_STATE] = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return {kind: size for kind, tensors in kinds.items() if (size := float(sum(map(_bytes, tensors))))}

    def _snapshot(self) -> str | None:
        if not self._on_gpu:
            return None
        path = self._folder / f"memory-rank-{self._trainer.ranks.rank}.pickle"
        with path.open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
        torch.cuda.memory._record_memory_history(enabled=None)
        return path.name


def _bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
