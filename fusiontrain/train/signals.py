"""A polite stop: the signal sets a flag, the loop saves and leaves at the end of its step."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""From a scheduler or torchrun, from a keyboard, and from Slurm's --signal shortly before the time limit."""

PATIENCE_SECONDS = 3.0


class StopRequest:
    """Whether this process was asked to stop: true once `reason` names a signal. `since` is the time of the first one."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.reason is not None

    def set(self, reason: str) -> None:
        self.reason = reason
        self.since = time.monotonic()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A StopRequest that the stop signals set while the context is open; a later second interrupt from the keyboard ends at once."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request:
            # One press of Ctrl-C arrives twice under torchrun: from the terminal and from the agent that passes it on.
            if number == signal.SIGINT and time.monotonic() - request.since > PATIENCE_SECONDS:
                raise KeyboardInterrupt
            return
        request.set(signal.Signals(number).name)
        logger.info("%s received: saving and stopping after this step", request.reason)

    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
