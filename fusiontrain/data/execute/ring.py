"""Equal pieces of anonymous shared memory that micro-batches are built into, each free again when nothing refers to it any more.

The memory has no name: it goes when the last process that maps it goes, however that one ended, and leaves nothing behind in /dev/shm.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import queue
import tempfile
import weakref
from collections.abc import Callable

import numpy as np

from fusiontrain.data.arena import ALIGNMENT

Fence = Callable[[], Callable[[], None]]
"""Called when a slot comes free: gives a function that waits until the device has read what the trainer had it copy from there."""

_NUMBERS = itertools.count()

SECONDS_BETWEEN_COLLECTIONS = 0.5


class Ring:
    """slots: how many; slot_bytes: of each, rounded up. `descriptor` maps all `nbytes` in another process, slot n from n * slot_bytes on.

    name: a number that no other ring of this process has.

    A slot is leased as an array. It comes free when that array and every view of it, tensors counted, are gone: so a batch that is kept stays as
    it is, and one that is dropped makes room, without a word from whoever had it.
    """

    def __init__(self, slots: int, slot_bytes: int, fence: Fence | None = None) -> None:
        self.name, self.slot_bytes = next(_NUMBERS), -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = slots * self.slot_bytes
        self.descriptor = _anonymous_file(self.nbytes)
        self._memory = mmap.mmap(self.descriptor, self.nbytes)
        self._fence = fence
        self._stopped = False
        # A SimpleQueue, because slots come free inside the garbage collector, which may interrupt a `get` of the same thread.
        self._free: queue.SimpleQueue[tuple[int, Callable[[], None] | None]] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put((slot, None))

    @property
    def memory(self) -> np.ndarray:
        """All slots, [bytes] uint8; it leases none of them."""
        return np.frombuffer(self._memory, np.uint8)

    def lease(self) -> tuple[int, np.ndarray]:
        """A slot's number and its memory, [slot_bytes] uint8. Waits until there is one. Raises RuntimeError once the ring is stopped.

        A read that failed and was tried again leaves exceptions in cycles, whose frames refer to the slot that was being filled: only the garbage
        collector frees those, and it does not run by itself while everybody waits.
        """
        while True:
            if self._stopped:
                raise RuntimeError("the ring is stopped")
            try:
                slot, wait = self._free.get(timeout=SECONDS_BETWEEN_COLLECTIONS)
                break
            except queue.Empty:
                gc.collect()
        if wait is not None:
            wait()
        array = np.frombuffer(self._memory, np.uint8, self.slot_bytes, slot * self.slot_bytes)
        weakref.finalize(array, self._release, slot).atexit = False
        return slot, array

    def stop(self) -> None:
        """Let nobody wait for a slot any longer."""
        self._stopped = True

    def close(self) -> None:
        """Lease no more. What is leased stays as it is; the memory goes with the last of it."""
        os.close(self.descriptor)
        del self._memory

    def _release(self, slot: int) -> None:
        self._free.put((slot, self._fence() if self._fence else None))


def _anonymous_file(nbytes: int) -> int:
    """The descriptor of a file in memory without a name, `nbytes` of zeros."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("fusiontrain-ring")
    else:  # not Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, nbytes)
    return descriptor
