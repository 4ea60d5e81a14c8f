"""What a rank does right now, and where its time went."""

from __future__ import annotations

import time

START = "start"
PHASES = (START, "data", "forward and backward", "optimizer", "agreement", "evaluate", "metrics", "sample", "save")
"""The parts of a step in their order. forward and backward ends with the norm of the gradients, agreement is where the ranks meet after the update."""


class Progress:
    """The step and the phase that a rank is at, written by the training loop and read by its watchdog.

    beats: counts every sign of life. seconds: of each phase in all, last_seconds: of its last visit, visits: how many there were.
    """

    def __init__(self) -> None:
        self.step = 0
        self.phase = START
        self.beats = 0
        self.seconds: dict[str, float] = {}
        self.last_seconds: dict[str, float] = {}
        self.visits: dict[str, int] = {}
        self._entered = self._beaten = time.monotonic()

    def enter(self, phase: str, step: int | None = None) -> None:
        """The phase before has ended, this one begins; with `step`, so does that step."""
        now = time.monotonic()
        spent, before = now - self._entered, self.phase
        self.seconds[before] = self.seconds.get(before, 0.0) + spent
        self.last_seconds[before] = spent
        self.visits[before] = self.visits.get(before, 0) + 1
        self.phase, self._entered = phase, now
        if step is not None:
            self.step = step
        self.beat()

    def beat(self) -> None:
        """A sign of life in the middle of a phase."""
        self.beats += 1
        self._beaten = time.monotonic()

    def phase_seconds(self) -> float:
        """How long the phase has lasted."""
        return time.monotonic() - self._entered

    def still_seconds(self) -> float:
        """How long there was no sign of life."""
        return time.monotonic() - self._beaten

    def table(self) -> str:
        """One line per phase: seconds in all, visits, mean and last visit; the phase of now is not in it."""
        rows = [f"{'phase':<22}{'seconds':>12}{'visits':>9}{'mean':>11}{'last':>11}"]
        for phase in (name for name in PHASES if name in self.seconds):
            total, visits = self.seconds[phase], self.visits[phase]
            rows.append(f"{phase:<22}{total:>12.3f}{visits:>9}{total / visits:>11.5f}{self.last_seconds[phase]:>11.5f}")
        return "\n".join(rows)
