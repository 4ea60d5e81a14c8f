"""How much memory tensors take while a piece of code runs, counted where torch makes them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """While active, `peak` is the most bytes that tensors made since then took at one moment; a view takes none."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        before = {id(storage) for storage in self._storages((args, kwargs))}
        for storage in self._storages(outputs):
            if id(storage) not in before and id(storage) not in self._seen:
                self._add(storage)
        return outputs

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        tensors = [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        local = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return [tensor.untyped_storage() for tensor in local if not tensor.is_meta]

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: weakref.ref) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
