"""Arrays laid out one behind the other in memory that is already there."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

ALIGNMENT = 64

Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""(shape, dtype) -> an array whose content is not defined yet, as `numpy.empty` does."""


class Arena:
    """memory: [bytes] uint8, which the arrays from `allocate` are views of."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.used = memory, 0

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The next array, on a border of ALIGNMENT bytes. Raises ValueError when the memory is used up."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self.used + nbytes > len(self.memory):
            raise ValueError(f"an arena of {len(self.memory)} bytes has {len(self.memory) - self.used} left, {nbytes} were asked for")
        array = self.at(self.used, shape, dtype)
        self.used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return array

    def at(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The array that lies at that offset, in bytes."""
        return self.memory[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def offset_of(self, array: np.ndarray) -> int:
        """Where in the memory an array from `allocate` lies; 0 for one without items, which lies nowhere."""
        return array.ctypes.data - self.memory.ctypes.data if array.size else 0
