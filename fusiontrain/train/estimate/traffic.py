"""The collectives that code runs, counted where PyTorch hands them to a process group: real, or of fake ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
COLLECTIVES = {
    "_allgather_base_": ALL_GATHER,
    "all_gather_into_tensor": ALL_GATHER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "reduce_scatter_tensor": REDUCE_SCATTER,
    "allreduce_": ALL_REDUCE,
    "all_reduce": ALL_REDUCE,
    "all_reduce_": ALL_REDUCE,
}
"""Operators of the namespaces c10d and _c10d_functional."""

WIRE_FACTOR = {ALL_GATHER: 1, REDUCE_SCATTER: 1, ALL_REDUCE: 2}
"""A ring moves this many times (n - 1) / n of a message through every rank."""


@dataclass(frozen=True)
class Channel:
    """A collective and the ranks of the group it ran in."""

    collective: str
    ranks: tuple[int, ...]


class TrafficCounter(TorchDispatchMode):
    """Calls, and bytes of messages, of every channel: a message is the gathered, or the not yet scattered, or the reduced tensor.

    parts: (calls, bytes) of what lies between two calls of `begin_part`, and before the first of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[Counter[Channel], Counter[Channel]]] = [(Counter(), Counter())]

    def begin_part(self) -> None:
        """Count what follows apart."""
        self.parts.append((Counter(), Counter()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        collective = COLLECTIVES.get(func._schema.name.partition("::")[2]) if func.namespace in ("c10d", "_c10d_functional") else None
        if collective is not None:
            channel = Channel(collective, _ranks((args, kwargs)))
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            calls, sizes = self.parts[-1]
            calls[channel] += 1
            sizes[channel] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def wire_bytes(channel: Channel, message_bytes: float) -> float:
    """Bytes that a rank sends, and receives, for messages of that many bytes."""
    size = len(channel.ranks)
    return WIRE_FACTOR[channel.collective] * message_bytes * (size - 1) / size


def _ranks(arguments: Any) -> tuple[int, ...]:
    """Of the process group among an operator's arguments, given as an object or by its name."""
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, torch.ScriptObject):
            try:
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(leaf)))
            except RuntimeError:  # another class of object, such as ReduceOp
                continue
        if isinstance(leaf, str) and leaf in dist.distributed_c10d._world.pg_names.values():
            return tuple(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(leaf)))
    raise AssertionError("a collective without a process group")
