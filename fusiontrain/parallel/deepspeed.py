"""DeepSpeed ZeRO as the other engine: stage 1 spreads the optimizer's state over the ranks, 2 also gradients, 3 also weights.

DeepSpeed is imported only where a run asks for it. It brings forward, backward and update; losses, learning rates, metrics and checkpoints
stay those of the trainer. Its settings are made from ours, and nothing is built with a compiler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fusiontrain.config.schema import ParallelConfig
from fusiontrain.models.plan import ModelPlan
from fusiontrain.parallel.flat_shard import FlatShard
from fusiontrain.types import Batch, LossTerm
from fusiontrain.utils.errors import UserError

LINEAR = nn.functional.linear
"""torch's own."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW's state, what has the shape of the parameter."""


class _PlainOutputs(nn.Module):
    """The model with outputs in which DeepSpeed finds the tensors: it looks into dicts and tuples alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, tuple[torch.Tensor | None, ...]]:
        return {name: tuple(vars(term).values()) for name, term in self.model(batch).items()}


@dataclass(frozen=True)
class _Piece:
    """Where a rank holds its elements of a parameter of `shape`: `length` of them from `start` on, at `place` of the line `flat`."""

    flat: torch.Tensor
    place: int
    start: int
    length: int
    shape: torch.Size

    def of(self, line: torch.Tensor) -> FlatShard:
        """The same elements of another line, such as one of the optimizer's moments."""
        return FlatShard(self.shape, self.start, line.detach().narrow(0, self.place, self.length))


@dataclass(frozen=True)
class Zero:
    """A model and its optimizer in DeepSpeed's hands.

    engine: deepspeed.DeepSpeedEngine. parameters: of the model, by the names it gave them. root: stage 3: those outside the shard units,
    which no hook gathers.
    """

    engine: Any
    stage: int
    parameters: Mapping[str, nn.Parameter]
    root: tuple[nn.Parameter, ...]

    @contextlib.contextmanager
    def whole_root(self) -> Iterator[None]:
        """Hold the weights outside the shard units while the model runs; DeepSpeed's hooks gather and free the units themselves."""
        if not self.root:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.root)):
            yield

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        """What the model itself returns, with gradients that `backward` can take."""
        return {name: LossTerm(*term) for name, term in self.engine(batch).items()}

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add to the gradients; with the `last` micro-batch of a step they are averaged over the ranks.

        A loss that is not finite makes the gradients NaN, by which `step` knows of it on all ranks.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan), scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update, forget the gradients; returns their norm before. Where that is not finite, nothing is updated."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def tensors(self, weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint stores, {"model": ..., "optimizer": ...}: each rank its pieces, sharing storage with what they are pieces of.

        weights: names of what is stored of the model; its buffers are taken as they are. Call `loaded` after loading into the result.
        """
        model, moments = dict(weights), {}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                piece = self._piece(parameter)
                state = _adam_state(self.engine.optimizer.optimizer, piece.flat)
                model[name] = piece.of(piece.flat)
                moments[f"{name}.step"] = state["step"]
                moments.update({f"{name}.{key}": piece.of(state[key]) for key in MOMENTS})
            elif name in model:
                model[name] = self._frozen(parameter)
        return {"model": model, "optimizer": moments}

    def loaded(self) -> None:
        """Give the model the weights that were loaded into `tensors`. All ranks call this together."""
        optimizer = self.engine.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def close(self) -> None:
        """Take the hooks off the model, and give torch back its linear layer, which stage 3 replaces for the whole process."""
        self.engine.destroy()
        nn.functional.linear = LINEAR

    def _frozen(self, parameter: nn.Parameter) -> torch.Tensor:
        if self.stage < 3:
            return parameter.detach()
        length = parameter.ds_tensor.ds_numel
        start = length * dist.get_rank()
        return _Piece(parameter.ds_tensor, 0, start, max(0, min(length, parameter.ds_numel - start)), parameter.ds_shape).of(parameter.ds_tensor)

    def _piece(self, parameter: nn.Parameter) -> _Piece:
        optimizer = self.engine.optimizer
        if self.stage == 3:
            group, place, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = length * dist.get_rank()
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return _Piece(flat, place, start, max(0, min(length, parameter.ds_numel - start)), parameter.ds_shape)
        group = next(index for index, members in enumerate(optimizer.bit16_groups) if any(parameter is member for member in members))
        flat, mapping = optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if mapping is None:  # none of it is on this rank
            return _Piece(flat, 0, 0, 0, parameter.shape)
        place, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
        return _Piece(flat, place, start, mapping.hp_fragment_address.numel, parameter.shape)


def start_zero(
    model: nn.Module,
    plan: ModelPlan,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    parallel: ParallelConfig,
    clip_norm: float,
    device: torch.device,
) -> Zero:
    """Hand a whole model on `device` and its optimizer to DeepSpeed, inside the process group of all ranks.

    parameters: of the model, by name, the same objects. The optimizer's groups and learning rates go on to count. Raises UserError where
    DeepSpeed cannot be imported.
    """
    deepspeed = import_deepspeed(device)
    stage, bfloat16 = parallel.zero_stage, parallel.precision == "bfloat16"
    units = [model.get_submodule(name) for name in plan.shard_units]
    for unit in units:
        deepspeed.utils.set_z3_leaf_module(unit, True)  # its weights are gathered together, as FSDP does
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    buffers = dict(model.named_buffers())
    first = {name: parameter.detach().clone() for name, parameter in parameters.items() if parameter.requires_grad and bfloat16}
    deepspeed.utils.groups._release_process_group_references()  # it would go on with those of a process group that is no more
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    with _hooks_as_they_are(model, units):
        engine, *_ = deepspeed.initialize(model=_PlainOutputs(model), optimizer=optimizer, config=_settings(parallel, clip_norm), dist_init_required=False)
    for name, buffer in buffers.items():  # DeepSpeed casts these too, and the model computes with them in float32
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, buffer)
    root = tuple(parameter for parameter in parameters.values() if stage == 3 and id(parameter) not in inside)
    for parameter in root:
        parameter.is_external_param = True  # the hooks of modules do not free what `whole_root` holds
    zero = Zero(engine, stage, parameters, root)
    for name, parameter in parameters.items():
        if name in first:  # the master weights begin with all their digits, not with what the cast left
            shard = zero._piece(parameter).of(zero._piece(parameter).flat)
            shard.local.copy_(first[name].flatten()[shard.start : shard.start + len(shard.local)])
    return zero


@contextlib.contextmanager
def _hooks_as_they_are(model: nn.Module, units: list[nn.Module]) -> Iterator[None]:
    """Take back the hooks that DeepSpeed gives to modules outside the shard units.

    They would gather as a module is called, and how often the modules of a patcher are called depends on the images that a rank has; in stage 3
    the ranks must call alike. The weights of these modules are the root's, which `Zero.whole_root` holds.
    """
    inside = {id(module) for unit in units for module in unit.modules()} | {id(model)}
    outside = [module for module in model.modules() if id(module) not in inside]
    before = [(module._forward_pre_hooks.copy(), module._forward_hooks.copy()) for module in outside]
    yield
    for module, (pre_hooks, hooks) in zip(outside, before, strict=True):
        for current, wanted in ((module._forward_pre_hooks, pre_hooks), (module._forward_hooks, hooks)):
            current.clear()
            current.update(wanted)


def import_deepspeed(device: torch.device) -> Any:
    """The package, quiet. Raises UserError where it is not installed or does not load."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists on a launcher, which one process does not need
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where its log goes from then on: stdout is for documents
            import deepspeed
    except Exception as error:  # it looks at compilers and drivers when it is imported
        raise UserError(
            f"parallel.engine=deepspeed: cannot be imported ({type(error).__name__}: {error}): pip install 'fusiontrain[deepspeed]', or set it to fsdp2"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every module whose outputs it cannot look into
    # Otherwise it tries them out with a compiler, and compiles for a minute what does the same as gloo on a CPU.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed


def _settings(parallel: ParallelConfig, clip_norm: float) -> dict[str, Any]:
    """DeepSpeed's own configuration. It has no say in batch sizes and learning rates, but wants numbers."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "gradient_clipping": clip_norm,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": parallel.precision == "bfloat16", "check_grad_overflow": True},
        "zero_optimization": {"stage": parallel.zero_stage, "stage3_param_persistence_threshold": 0},
    }


def _adam_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of one line of parameters, made (zeros) where no step has been taken yet."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state.update({key: torch.zeros_like(flat) for key in MOMENTS})
    return state
