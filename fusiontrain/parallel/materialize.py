"""From a declared model to one with values: every rank allocates and reads its own shards, and never the whole."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fusiontrain.models.plan import ReadRows
from fusiontrain.parallel.activation import clean_name


def is_declared(model: nn.Module) -> bool:
    """Whether the parameters of `model` are on the meta device, without values."""
    return any(parameter.is_meta for parameter in model.parameters())


def materialize(model: nn.Module, device: torch.device, shards_on: torch.device) -> None:
    """Allocate the parameters of a declared model, in place and without values: shards on `shards_on`, whole tensors and buffers on `device`."""
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    for name, buffer in buffers.items():
        assert not buffer.is_meta, f"{name} was computed on the meta device: give the tensors that it is made from device='cpu'"
    model.to_empty(device=shards_on)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor) and shards_on != device:
            parameter.data = torch.empty_like(parameter, device=device)
    for name, buffer in buffers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, buffer)


@torch.no_grad()
def fill_shards(model: nn.Module, read_rows: ReadRows) -> None:
    """Give every parameter of `model` its first value, in place: the rows that this rank holds of it, cast to its dtype."""
    for name, parameter in model.named_parameters():
        first, last = local_rows(parameter)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(read_rows(clean_name(name), parameter.shape, first, last))


def local_rows(parameter: torch.Tensor) -> tuple[int, int]:
    """The rows of `parameter` that this rank holds, first and one behind the last: all of a tensor that is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0, len(parameter)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert shape[1:] == parameter.shape[1:], f"sharded along another dim than the first: {parameter.placements}"
    return offset[0], offset[0] + shape[0]
