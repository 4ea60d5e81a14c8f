"""What tensors hold, storage by storage, while code runs: of real tensors, or of fake ones that have sizes and no memory."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusiontrain_kernels.linear_cross_entropy.chunked import ROWS

ACTIVATIONS, GATHERED, WHOLE_GRADIENTS, LOSS = "activations", "gathered weights and buffers", "gradients before reduction", "loss workspace"
"""Labels of storages that are nobody's weight, gradient or optimizer state."""

ENGINE_NAMESPACES = ("fsdp", "c10d", "_c10d_functional")
COPY_IN_GRADIENTS = "fsdp::chunk_cat"
LOSS_OPERATOR = "fusiontrain::linear_cross_entropy"


Phase = TypeVar("Phase", bound=Hashable)


@dataclass
class Peak:
    """The largest sum of bytes in a phase, and what was live then: serial number of a storage -> (bytes, label)."""

    bytes: int = 0
    live: dict[int, tuple[int, str]] = field(default_factory=dict)


class MemoryTracker(TorchDispatchMode, Generic[Phase]):
    """Follows every storage that an operator makes while the mode is on, until it is freed; `phase` says which peak is being looked for.

    Not seen: what an operator needs inside itself, but for the head's loss, whose logits are the largest such thing there is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peaks: dict[Phase, Peak] = {}
        self._peak = Peak()
        self._rising = False
        self._live: dict[int, tuple[int, str]] = {}
        self._fates: dict[int, str] = {}  # labels of storages that the engine came to use, whoever made them
        self._known: dict[int, tuple[weakref.ref, int]] = {}  # address of a storage -> (reference, serial number)
        self._serials = itertools.count()

    def __enter__(self) -> MemoryTracker:
        self._resize = torch.UntypedStorage.resize_
        tracker, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP gives gathered weights their memory, and takes it, by this
            result = resize(storage, size)
            tracker._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its shards come past once more
        workspace = self._add_new(_workspace(func, args), LOSS)
        result = func(*args, **(kwargs or {}))
        label = label_of(func)
        if label == GATHERED:
            self._used_by_engine(func, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, label)
        self._free(workspace)
        return result

    def begin(self, phase: Phase) -> None:
        """From here on the peak is that of `phase`, which may come more than once."""
        self._close_peak()
        self._peak = self.peaks.setdefault(phase, Peak())
        self._rising = self._peak.bytes < self.bytes
        self._peak.bytes = max(self._peak.bytes, self.bytes)

    def end(self) -> None:
        """The last phase is over."""
        self._close_peak()
        self._peak, self._rising = Peak(), False

    def serials(self, tensors: Iterable[torch.Tensor]) -> set[int]:
        """Serial numbers of the storages of tensors; of the shards of distributed ones."""
        locals_ = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        keys = (tensor.untyped_storage()._cdata for tensor in locals_)
        return {self._known[key][1] for key in keys if key in self._known}

    def categories(self, phase: Phase, owners: Mapping[str, set[int]]) -> dict[str, float]:
        """Bytes of each category at the peak of a phase: those of `owners` by the serial numbers they own, the rest by what became of them."""
        category_of = self._fates | {serial: name for name, serials in owners.items() for serial in serials}
        found: Counter[str] = Counter()
        for serial, (size, label) in self.peaks[phase].live.items():
            found[category_of.get(serial, label)] += size
        return {category: size for category, size in found.items() if size}

    def _see(self, tensor: torch.Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        serial = self._add_new(storage.nbytes(), label)
        self._known[key] = (weakref.ref(storage, self._forget(key, serial)), serial)

    def _forget(self, key: int, serial: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self._free(serial)

        return forget

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._known.get(storage._cdata)
        if known is not None:
            self._free(known[1])
            self._add(known[1], storage.nbytes(), GATHERED)

    def _used_by_engine(self, func: Any, args: Any, kwargs: Any) -> None:
        label = WHOLE_GRADIENTS if func._schema.name == COPY_IN_GRADIENTS else GATHERED
        for arguments, fate in ((args, label), (kwargs, GATHERED)):
            for serial in self.serials(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)):
                self._fates.setdefault(serial, fate)

    def _add_new(self, size: int, label: str) -> int:
        serial = next(self._serials)
        self._add(serial, size, label)
        return serial

    def _add(self, serial: int, size: int, label: str) -> None:
        self._live[serial] = (size, label)
        self.bytes += size
        if self.bytes > self._peak.bytes:
            self._peak.bytes, self._rising = self.bytes, True

    def _free(self, serial: int) -> None:
        self._close_peak()  # a peak is left, if at all, where something is freed
        self.bytes -= self._live.pop(serial, (0, ""))[0]

    def _close_peak(self) -> None:
        if self._rising:
            self._peak.live, self._rising = dict(self._live), False


def label_of(func: Any) -> str:
    """What a storage is for that this operator makes, unless it turns out to be somebody's weight, gradient or optimizer state."""
    if func.namespace in ENGINE_NAMESPACES:
        return GATHERED
    return LOSS if func._schema.name == LOSS_OPERATOR else ACTIVATIONS


def _workspace(func: Any, args: Any) -> int:
    """Bytes inside the operator of the head and its loss: the logits of one chunk of rows, and "chunked" has them in float32 too."""
    if func._schema.name != LOSS_OPERATOR:
        return 0
    hidden, weight, *_, weight_live, impl = args
    logits = min(ROWS[impl], len(hidden)) * len(weight)
    wide = torch.promote_types(hidden.dtype, torch.float32).itemsize
    work = logits * (hidden.dtype.itemsize + (wide if impl == "chunked" else 0))
    product = weight.numel() * hidden.dtype.itemsize if impl == "chunked" and weight_live and hidden.dtype.itemsize != wide else 0
    return work + product
