"""How much memory a piece of code takes: its tensors, counted where torch makes them, or all of a process, as the system counts it."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

M_MMAP_THRESHOLD = -3
"""As malloc.h has it."""


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


def peak_rss_above_baseline(work: Callable[[], object], warm_up: Callable[[], object]) -> int:
    """Bytes of memory that a fork of this process needs for `work()` beyond those it has after `warm_up()`, such as the same on something small:
    a fork also counts the code that it runs, once it does. Linux only."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 2**20)  # what is freed goes back at once: glibc keeps up to 32 MiB for later, in pieces
            warm_up()
            libc.malloc_trim(0)  # what was kept before would be used again, uncounted
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _of_this_process("VmRSS")
            work()
            os.write(writing, str(_of_this_process("VmHWM") - before).encode())
        finally:
            os._exit(0)  # without an answer, the reader finds nothing
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return int(file.read())


def _of_this_process(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
