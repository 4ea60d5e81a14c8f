"""One optimizer step of the real model under the real engine on fake ranks: sizes without memory, collectives without a network."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fully_shard
from torch.distributed.tensor import DTensor

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.models.fusion import FusionModel
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.mesh import Ranks, build_mesh, needs_group
from fusiontrain.train.ema import average_weights
from fusiontrain.train.estimate.memory import MemoryTracker
from fusiontrain.train.estimate.traffic import Channel, TrafficCounter
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import accumulate_gradients, objective_weights
from fusiontrain.types import Batch

FORWARD, LOSS, BACKWARD, OPTIMIZER = PHASES = ("forward", "loss", "backward", "optimizer")
WEIGHTS, WHOLE_WEIGHTS, GRADIENTS, OPTIMIZER_STATE = "weights", "weights that are whole on every rank", "gradients", "optimizer state"
AVERAGES = "moving average of the weights"


Moment = tuple[str, int, str]
"""A phase, the number of its micro-batch, and the part of the blocks that it is in: a stretch of a step in which memory only grows or only shrinks
from block to block."""


@dataclass(frozen=True)
class Simulated:
    """Of one rank. moments: bytes of each category at the peak of each moment. calls and bytes: of each channel in one step."""

    moments: dict[Moment, dict[str, float]]
    calls: dict[Channel, float]
    bytes: dict[Channel, float]

    @property
    def memory(self) -> dict[str, dict[str, float]]:
        """Bytes of each category at the peak of each phase."""
        by_size = sorted(self.moments.items(), key=lambda item: sum(item[1].values()))
        largest = {phase: categories for (phase, _, _), categories in by_size}
        return {phase: largest[phase] for phase in PHASES}


def simulate(config: Config, batch: Batch, micro_batches: int, world_size: int) -> Simulated:
    """A step of `micro_batches` such batches on rank 0 of `world_size` ranks. The batch is real and on the CPU; nothing is computed with it."""
    with fake_group(config, world_size), only_first_shards(), real_meshes():
        ranks = Ranks(0, world_size)
        mesh = build_mesh(config.parallel, ranks)
        tracker, counter = MemoryTracker[Moment](), TrafficCounter()
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            model = build_model(config)
            _hook_phases(model, tracker, counter)
            embeddings = embedding_names(model)
            # Fake tensors are on the CPU already, and Module.to would swap them, which they refuse.
            model.to = lambda *_, **__: model
            parameters = parallelize(model, model.plan(), config.parallel, mesh, ranks.device)
            optimizer = build_optimizer(parameters, embeddings, config.optimizer)
            averages = average_weights(optimizer, parameters, config.train.ema_decay) if config.train.ema_decay is not None else {}
            trainable = [parameter for parameter in parameters.values() if parameter.requires_grad]
            _update_once(optimizer, trainable, config.optimizer.clip_norm)
            weights = objective_weights(config.objective)
            with counter:  # three micro-batches tell what any number takes: between the first and the last one they are alike
                accumulate_gradients(model, [batch] * min(micro_batches, 3), weights, batch.target_counts, world_size, ranks.device)
                owners = {**_owners(tracker, model, trainable, optimizer), AVERAGES: tracker.serials(averages.values())}
                tracker.begin((OPTIMIZER, 0, ""))
                torch.nn.utils.clip_grad_norm_(trainable, config.optimizer.clip_norm)
                optimizer.step()
            tracker.end()
    moments = {moment: tracker.categories(moment, owners) for moment in tracker.peaks}
    return Simulated(moments, *_all_parts(counter, micro_batches))


@contextlib.contextmanager
def fake_group(config: Config, world_size: int) -> Iterator[None]:
    """A process group of ranks that are not there, as far as the engine would make one."""
    if not needs_group(world_size, config.parallel):
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def only_first_shards() -> Iterator[None]:
    """Lets FSDP cut off the shard of rank 0 alone. It would make those of all ranks to take its own, which is most of the time for hundreds."""

    def first(tensor: torch.Tensor, num_chunks: int, dim: int) -> list[torch.Tensor]:
        return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // num_chunks))]

    with mock.patch.object(_fsdp_param, "_chunk_with_empty", first):
        yield


@contextlib.contextmanager
def real_meshes() -> Iterator[None]:
    """Lets FSDP make meshes of ranks, which are numbers and not fake, for weights that are sharded anew after the forward."""
    make = _fully_shard._get_post_forward_mesh_info

    def outside(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return make(*arguments)

    with mock.patch.object(_fully_shard, "_get_post_forward_mesh_info", outside):
        yield


def _hook_phases(model: FusionModel, tracker: MemoryTracker[Moment], counter: TrafficCounter) -> None:
    """Let the model's own forward, and the gradients that pass its blocks, say when a moment begins."""

    def begin(phase: str, part: str = "") -> None:
        tracker.begin((phase, len(counter.parts), part))

    def forward_begins(*_: Any) -> None:
        counter.begin_part()
        begin(FORWARD)

    model.register_forward_pre_hook(forward_begins)
    model.text_objective.register_forward_pre_hook(lambda *_: begin(LOSS))
    model.register_forward_hook(lambda *_: begin(BACKWARD))
    for number, block in enumerate(model.blocks[:-1]):
        part = "blocks between" if number else "first block"

        def on_gradient(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, Any], part: str = part) -> None:
            if output[0].requires_grad:
                output[0].register_hook(lambda _: begin(BACKWARD, part))

        block.register_forward_hook(on_gradient)


def _all_parts(counter: TrafficCounter, micro_batches: int) -> tuple[dict[Channel, float], dict[Channel, float]]:
    """Calls and bytes of all micro-batches. Part 0 lies before the first of them, and the update belongs to the last."""
    times = [micro_batches - 2 if number == 2 and micro_batches > 2 else 1 for number in range(len(counter.parts))]
    calls: Counter[Channel] = Counter()
    sizes: Counter[Channel] = Counter()
    for (part_calls, part_sizes), count in zip(counter.parts, times, strict=True):
        for channel in part_calls:
            calls[channel] += count * part_calls[channel]
            sizes[channel] += count * part_sizes[channel]
    return dict(calls), dict(sizes)


def _update_once(optimizer: torch.optim.Optimizer, trainable: list[nn.Parameter], clip_norm: float) -> None:
    """AdamW makes its state at its first step, and the step to look at is a later one. So it is with what DTensor works out once per operator,
    by fake tensors of its own that would be taken for memory."""
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    torch.nn.utils.clip_grad_norm_(trainable, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _owners(tracker: MemoryTracker[Moment], model: nn.Module, trainable: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Mapping[str, set[int]]:
    """Whose the storages are after a backward."""
    weights = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        WHOLE_WEIGHTS: tracker.serials([*(weight for weight in weights if not isinstance(weight, DTensor)), *model.buffers()]),
        WEIGHTS: tracker.serials(weight for weight in weights if isinstance(weight, DTensor)),
        GRADIENTS: tracker.serials(parameter.grad for parameter in trainable if parameter.grad is not None),
        OPTIMIZER_STATE: tracker.serials(states),
    }
