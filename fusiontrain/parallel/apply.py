"""Everything that is done to a model from outside, in the one order in which it works."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fusiontrain.config.schema import ParallelConfig
from fusiontrain.models.plan import ModelPlan, ReadRows
from fusiontrain.parallel.activation import clean_name, recompute_activations
from fusiontrain.parallel.compile import compile_units
from fusiontrain.parallel.fsdp import shard
from fusiontrain.parallel.materialize import fill_shards, is_declared, materialize


def parallelize(
    model: nn.Module,
    plan: ModelPlan,
    parallel: ParallelConfig,
    mesh: DeviceMesh | None,
    device: torch.device,
    read_rows: ReadRows | None = None,
) -> dict[str, nn.Parameter]:
    """Freeze, move, wrap and shard `model` in place, and return its parameters by the names the model gave them.

    A model that is only declared (its parameters are on the meta device) gets its values from `read_rows`, each rank its own shards.
    The returned parameters are the ones an optimizer and a checkpoint hold: with a mesh they are DTensors, which stay the same
    objects while FSDP swaps gathered weights in and out of the modules. Where weights are tied, the first name stands for all.
    """
    freeze(model, plan.frozen, parallel.precision == "bfloat16")  # first: the plan names parameters, and later lines rename or replace them
    if not is_declared(model):
        model.to(device)
    # Before compile, which must see the recomputed region as one graph.
    recompute_activations(model, plan.recompute, parallel.activation_checkpointing, parallel.activation_checkpointing_every)
    if parallel.compile:
        compile_units(model, plan.shard_units, any_number_of_rows=parallel.frozen_prefix and bool(plan.frozen))
    if mesh is not None:
        shard(model, plan, mesh, parallel)  # after those: it takes over the parameters that they left in place
    if is_declared(model):
        assert read_rows is not None, "a declared model needs its weights"
        materialize(model, device, torch.device("cpu") if parallel.cpu_offload else device)  # last: what is cut already is allocated in pieces
        fill_shards(model, read_rows)
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def freeze(model: nn.Module, frozen: tuple[str, ...], in_bfloat16: bool) -> None:
    """Stop gradients of the named parameters and, where the run computes in it, keep them in bfloat16: no update needs more digits.

    Raises KeyError where the model has no parameter of that name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in frozen:
        parameters[name].requires_grad_(False)
        if in_bfloat16:
            parameters[name].data = parameters[name].data.bfloat16()
