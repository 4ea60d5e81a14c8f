"""Host memory that a CUDA device copies from by itself, while the trainer goes on. Needs torch, which workers do not load."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

logger = logging.getLogger(__name__)

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process


def pin(memory: np.ndarray) -> bool:
    """Pin [bytes] uint8; False, with a warning, where CUDA refuses."""
    error = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, PORTABLE)
    if int(error) != 0:
        logger.warning("%d bytes for data.prefetch_bytes cannot be pinned (CUDA error %d): batches go to the device more slowly", memory.nbytes, int(error))
        return False
    return True


def unpin(memory: np.ndarray) -> None:
    """Undo `pin`, once the device has read all that it was told to."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)


def fence() -> Callable[[], None]:
    """Of all copies that this thread has asked for on its current stream: a function that waits for the last of them."""
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
