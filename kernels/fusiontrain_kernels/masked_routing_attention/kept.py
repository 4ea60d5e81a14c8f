"""What the host makes of `key_ranges`, made once per tensor: the layers of a model share it, and so does a backward that computes them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Kept(Generic[T]):
    """`make(key_ranges)` for a tensor, kept as long as the tensor lives and nobody writes to it. The result must not refer to the tensor."""

    def __init__(self, make: Callable[[torch.Tensor], T]) -> None:
        self._make = make
        self._known = WeakTensorKeyDictionary()  # key_ranges -> (its version, the result)

    @_disable_dynamo  # reads numbers on the host: not for a graph. Unlike torch.compiler.disable it does not import the compiler (a second)
    def __call__(self, key_ranges: torch.Tensor) -> T:
        if key_ranges.is_inference():  # does not count its writes
            return self._make(key_ranges)
        known = self._known.get(key_ranges)
        if known is None or known[0] != key_ranges._version:
            known = self._known[key_ranges] = (key_ranges._version, self._make(key_ranges))
        return known[1]

    def __len__(self) -> int:
        return len(self._known)
