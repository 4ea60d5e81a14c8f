"""FSDP2: every shard unit is gathered before it runs and freed after it; gradients are averaged over all ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils import _pytree

from fusiontrain.models.plan import ModelPlan
from fusiontrain.types import LossTerm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shard(model: nn.Module, plan: ModelPlan, mesh: DeviceMesh, precision: str) -> None:
    """Shard the plan's units and then the root (what no unit holds) over `mesh`, in place.

    The parameters of one unit that train must share one dtype; frozen ones may have another.
    """
    _register_loss_term()
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[precision],
        reduce_dtype=torch.float32,
        # The default casts every floating tensor of the batch, which would round loss weights and noise levels.
        cast_forward_inputs=False,
    )
    units = [model.get_submodule(name) for name in plan.shard_units]
    for module in [*units, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        for method in plan.forward_methods:
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over the ranks (the last micro-batch) or keeps adding them up locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def free_gathered(model: nn.Module) -> None:
    """Free the weights that a forward without a backward leaves gathered, so that parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _register_loss_term() -> None:
    """Let FSDP see the tensors inside the model's outputs: it hooks the backward of what pytree can flatten."""
    if LossTerm not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(LossTerm)
