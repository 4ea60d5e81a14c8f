"""FSDP2: every shard unit is gathered before it runs and freed after it; gradients are averaged over all ranks.

The mesh says what that means: ("dp_shard",) shards over all ranks; ("dp_replicate", "dp_shard") keeps several copies, each over its own ranks
(HSDP); with dp_shard = 1 nothing is cut and nothing gathered, and gradients are all-reduced (DDP).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.utils import _pytree

from fusiontrain.config.schema import ParallelConfig
from fusiontrain.models.plan import ModelPlan
from fusiontrain.types import LossTerm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STAYS_GATHERED = "weights_stay_gathered"
"""Attribute of a sharded module: whether its weights are kept between its forward and its backward."""


def shard(model: nn.Module, plan: ModelPlan, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Shard the plan's units and then the root (what no unit holds) over `mesh`, in place.

    The parameters of one unit that train must share one dtype; frozen ones may have another, and are left as they are where
    `parallel.frozen` is "replicate".
    """
    _register_loss_term()
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[parallel.precision],
        reduce_dtype=torch.float32,
        # The default casts every floating tensor of the batch, which would round loss weights and noise levels.
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if parallel.cpu_offload else OffloadPolicy()
    whole = parallel.frozen == "replicate" or mesh["dp_shard"].size() == 1  # what is not cut would be gathered into a second copy
    ignored = {parameter for parameter in model.parameters() if whole and not parameter.requires_grad}
    units = [model.get_submodule(name) for name in plan.shard_units]
    for module in [*units, model]:
        reshard = _reshard_after_forward(parallel, mesh, module is model)
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard, ignored_params=ignored)
        setattr(module, STAYS_GATHERED, reshard is False)
        for method in plan.forward_methods:
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
    _prefetch(units, parallel)


def _reshard_after_forward(parallel: ParallelConfig, mesh: DeviceMesh, is_root: bool) -> bool | int:
    """Whether to free gathered weights after the forward, or over how many ranks to spread them then.

    The root's are needed again as soon as the backward begins, so by default they stay; and where nothing is sharded, freeing would only copy.
    """
    policy = parallel.reshard_after_forward
    if policy == "always":
        return True
    if policy == "never" or is_root or mesh["dp_shard"].size() == 1:
        return False
    return policy if isinstance(policy, int) else True


def _prefetch(units: list[nn.Module], parallel: ParallelConfig) -> None:
    """Name the units whose gathering starts while another one runs; FSDP itself starts one ahead in the backward."""
    for index, unit in enumerate(units):
        if parallel.forward_prefetch:
            unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + parallel.forward_prefetch])
        if parallel.backward_prefetch > 1:
            unit.set_modules_to_backward_prefetch(units[:index][::-1][: parallel.backward_prefetch])


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over the ranks (the last micro-batch) or keeps adding them up locally.

    Weights that stay gathered after a forward also stay so for the next micro-batch: they have not changed.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(enabled)
    for module in model.modules():
        if isinstance(module, FSDPModule) and getattr(module, STAYS_GATHERED):
            module.set_reshard_after_backward(enabled, recurse=False)


def free_gathered(model: nn.Module) -> None:
    """Free the weights that a forward without a backward leaves gathered, so that parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _register_loss_term() -> None:
    """Let FSDP see the tensors inside the model's outputs: it hooks the backward of what pytree can flatten."""
    if LossTerm not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(LossTerm)
