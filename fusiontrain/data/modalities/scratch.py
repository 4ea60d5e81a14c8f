"""Memory that a thread works in again and again: it stays in the caches of its core, and the system is not asked for pages anew for each picture."""

from __future__ import annotations

import math
import threading

import numpy as np
from numpy.typing import DTypeLike

MOST_BYTES = 16 << 20
"""A larger array is made for its one use: a thread must not hold the memory of the largest picture it ever met."""

_of_thread = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array whose content is not defined, good until this thread asks for the scratch of that name again."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > MOST_BYTES:
        return np.empty(shape, dtype)
    memory = getattr(_of_thread, name, None)
    if memory is None or len(memory) < nbytes:
        memory = np.empty(nbytes, np.uint8)
        setattr(_of_thread, name, memory)
    return memory[:nbytes].view(dtype).reshape(shape)
