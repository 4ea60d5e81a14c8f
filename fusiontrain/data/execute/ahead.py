"""Steps built ahead of the trainer, in order, into a ring whose size in bytes is what bounds how far ahead."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from fusiontrain.data.execute.build import Built
from fusiontrain.data.execute.job import copied
from fusiontrain.data.execute.pin import fence, pin, unpin
from fusiontrain.data.execute.ring import Ring
from fusiontrain.data.plan.plan import PlannedSequence

logger = logging.getLogger(__name__)

MOST_STEPS_AHEAD = 64
"""Small batches would otherwise be planned and built for thousands of steps that may never come."""

STEPS_WITH_THE_TRAINER = 2
"""The one it has and, until it lets go of that, the one that it is being given."""

MicroBatch = Sequence[PlannedSequence]
Build = Callable[[MicroBatch, Ring], tuple[Built, np.ndarray]]


def steps_ahead(prefetch_bytes: int, step_bytes: int) -> int:
    """How many steps may be under way, so that they and those with the trainer take no more than `prefetch_bytes`; always one at least."""
    return min(MOST_STEPS_AHEAD, max(1, prefetch_bytes // step_bytes - STEPS_WITH_THE_TRAINER))


class Ahead:
    """One iteration. plan(step): the micro-batches of a step, `parts` of them, or None behind the last step. build(micro_batch, ring): what one
    becomes, and the slot that it lies in.

    `threads` threads call both, and an error of theirs is raised where its step would have come.
    """

    def __init__(
        self, plan: Callable[[int], Sequence[MicroBatch] | None], build: Build, parts: int, slot_bytes: int, prefetch_bytes: int, threads: int, pinned: bool
    ) -> None:
        self._plan, self._build, self.parts = plan, build, parts
        self.depth = steps_ahead(prefetch_bytes, parts * slot_bytes)
        if self.depth * parts < threads:
            room = self.depth * parts
            logger.info("data.prefetch_bytes=%d has room for %d micro-batches ahead, so only as many of %d workers are used", prefetch_bytes, room, threads)
        self.ring = Ring((self.depth + STEPS_WITH_THE_TRAINER) * parts, slot_bytes, fence if pinned else None)
        self._pinned = pinned and pin(self.ring.memory)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._stopped = False
        self._handed: list[weakref.ref[np.ndarray]] = []

    def steps(self, step: int) -> Iterator[list[Built]]:
        """The micro-batches of the steps from `step` on. They stay as they are as long as they are kept."""
        waiting: deque[list[Future[tuple[Built, np.ndarray] | None]]] = deque()
        for ahead in range(self.depth):
            waiting.append(self._submit(step + ahead))
        while not self._stopped:
            found = [built for future in waiting.popleft() if (built := future.result()) is not None]
            if not found:
                return
            waiting.append(self._submit(step + self.depth))
            step += 1
            handed = self._hand_over(found)
            del found
            yield handed
            del handed

    def stop(self) -> None:
        """Begin nothing more, and let `steps` end."""
        self._stopped = True
        self.ring.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop, wait for what is being built, and give the ring back."""
        self.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._pinned:
            unpin(self.ring.memory)
        self.ring.close()

    def _submit(self, step: int) -> list[Future[tuple[Built, np.ndarray] | None]]:
        planned = self._threads.submit(self._plan, step)
        return [self._threads.submit(self._part, planned, part) for part in range(self.parts)]

    def _part(self, planned: Future[Sequence[MicroBatch] | None], part: int) -> tuple[Built, np.ndarray] | None:
        micro_batches = planned.result()  # it was submitted before, so it is never behind this in the queue
        return None if micro_batches is None else self._build(micro_batches[part], self.ring)

    def _hand_over(self, found: list[tuple[Built, np.ndarray]]) -> list[Built]:
        """What lies in the ring, or copies where the trainer keeps older ones: else it would wait for slots that it holds itself."""
        self._handed = [slot for slot in self._handed if slot() is not None]
        if len(self._handed) + len(found) > STEPS_WITH_THE_TRAINER * self.parts:
            return [copied(built) for built, _ in found]
        self._handed += [weakref.ref(memory) for _, memory in found]
        return [built for built, _ in found]
