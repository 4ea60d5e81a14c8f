"""A polite stop: the signal sets a flag, all ranks agree on it where they meet, and the run saves and leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from fusiontrain.parallel.reduce import sum_integers

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""From a scheduler or torchrun, from a keyboard, and from Slurm's --signal shortly before the time limit."""

REPORT_SIGNAL = signal.SIGQUIT
"""Asks for a report of what every rank does (see `watchdog.py`) and changes nothing else, as of a Java program. Ctrl-\\ on a terminal."""

PATIENCE_SECONDS = 3.0


class BreakOff(Exception):
    """All ranks leave what can be given up, such as an evaluation, because one of them was asked to stop. All ranks raise it together."""


class StopRequest:
    """Whether this process was asked to stop: true once `reason` names a signal. `since` is the time of the first one.

    agreed: all ranks know that one of them was asked, and act on it alike; the flag of one rank alone must never decide anything.
    wake: a file descriptor that becomes readable with every signal, even while the main thread hangs; None where nobody listens for signals.
    """

    def __init__(self, wake: int | None = None) -> None:
        self.reason: str | None = None
        self.since = 0.0
        self.agreed = False
        self.wake = wake

    def __bool__(self) -> bool:
        return self.reason is not None

    def set(self, reason: str) -> None:
        self.reason = reason
        self.since = time.monotonic()

    def agree(self) -> bool:
        """Whether any rank was asked to stop. All ranks call this together; from the first yes on it costs nothing."""
        self.agreed = self.agreed or bool(sum_integers([bool(self)])[0])
        return self.agreed

    def check(self) -> None:
        """Raise BreakOff on all ranks if any was asked to stop. All ranks call this together."""
        if self.agree():
            raise BreakOff


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A StopRequest that the stop signals set while the context is open; a later second interrupt from the keyboard ends at once."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    request = StopRequest(wake)

    def handle(number: int, frame: FrameType | None) -> None:
        if request:
            # One press of Ctrl-C arrives twice under torchrun: from the terminal and from the agent that passes it on.
            if number == signal.SIGINT and time.monotonic() - request.since > PATIENCE_SECONDS:
                raise KeyboardInterrupt
            return
        request.set(signal.Signals(number).name)
        logger.info("%s received: saving and stopping after this step", request.reason)

    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    previous[REPORT_SIGNAL] = signal.signal(REPORT_SIGNAL, lambda number, frame: None)  # the watchdog reads it from the pipe
    previous_wake = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    try:
        yield request
    finally:
        signal.set_wakeup_fd(previous_wake)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(wake)
        os.close(woken)
