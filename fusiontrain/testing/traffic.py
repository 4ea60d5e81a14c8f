"""What a piece of code sends between ranks, seen where torch hands it to the process group."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
}
"""Operator of torch's c10d namespace -> collective."""


class Traffic(TorchDispatchMode):
    """While active, counts this rank's collectives: `calls[kind]`, and `sizes[kind]` in bytes of the whole message,
    which is what an all-gather puts together, what a reduce-scatter takes apart and what an all-reduce sums."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.partition("::")[2]
            kind = KINDS.get(name, name)
            tensors = [value for value in _pytree.tree_leaves((args, kwargs or {})) if isinstance(value, torch.Tensor)]
            self.calls[kind] += 1
            self.sizes[kind] += max(tensor.numel() * tensor.itemsize for tensor in tensors)
        return function(*args, **(kwargs or {}))
