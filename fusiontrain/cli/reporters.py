"""What a person sees of a run on stderr: a live view on a terminal, lines that grep well in a log."""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontrain.cli.common import note
from fusiontrain.modality import MODALITY_NAMES

if TYPE_CHECKING:
    from rich.console import RenderableType

logger = logging.getLogger(__name__)

SAVED = re.compile(r"step (\d+): saved ")
"""How an event begins that tells of a checkpoint."""
REFRESHES_PER_SECOND = 2
BAR_WIDTH = 32


def make_reporter(is_main: bool) -> SilentReporter:
    """A live view on a terminal, plain lines elsewhere, nothing but the log on ranks other than the main one."""
    if not is_main:
        return LogReporter()
    return LiveReporter() if sys.stderr.isatty() else PlainReporter()


class SilentReporter:
    """Says nothing. The base of the others, and the shape that `train.trainer.Reporter` asks for."""

    def indexing(self, done: int, total: int) -> None:
        pass

    def started(self, step: int, steps: int, run_dir: Path) -> None:
        pass

    def step(self, values: Mapping[str, Any], due: bool) -> None:
        pass

    def event(self, text: str) -> None:
        pass

    def finished(self) -> None:
        pass


class LogReporter(SilentReporter):
    """Where a run begins and what happens in it, in `logs/rank-N.log` of the run folder."""

    def started(self, step: int, steps: int, run_dir: Path) -> None:
        self.event(f"training {run_dir} from step {step} to {steps}")

    def event(self, text: str) -> None:
        logger.info(text)


class PlainReporter(LogReporter):
    """One line per `train.log_every_steps`, for log files: `step 100/2000 loss 1.2345 text 0.9 image 0.1 ... eta 2:03`."""

    def indexing(self, done: int, total: int) -> None:
        if done == total or (done >= 8 and done & (done - 1) == 0):
            note(f"indexed {done} of {total} shards")

    def started(self, step: int, steps: int, run_dir: Path) -> None:
        self.steps = steps
        self.eta = Eta(step, steps)
        super().started(step, steps, run_dir)

    def step(self, values: Mapping[str, Any], due: bool) -> None:
        left = self.eta.update(values["step"])
        if due:
            note(f"step {values['step']}/{self.steps} {describe_step(values)} {describe_pace(values)} eta {format_seconds(left)}")

    def event(self, text: str) -> None:
        super().event(text)
        note(text)


class LiveReporter(LogReporter):
    """A few lines that redraw themselves at the bottom of the terminal, with events above them: progress, losses, pace, the last checkpoint."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.done = self.total = 0
        self.what = "starting"
        self.left: float | None = None
        self.values: dict[str, Any] = {}
        self.saved: tuple[str, float] | None = None
        self.console = Console(stderr=True)
        self.live = Live(get_renderable=self._view, console=self.console, refresh_per_second=REFRESHES_PER_SECOND)

    def indexing(self, done: int, total: int) -> None:
        self.what, self.done, self.total = "indexing shards", done, total
        self.live.start()

    def started(self, step: int, steps: int, run_dir: Path) -> None:
        self.eta = Eta(step, steps)
        self.what, self.done, self.total = str(run_dir), step, steps
        self.live.start()
        super().started(step, steps, run_dir)

    def step(self, values: Mapping[str, Any], due: bool) -> None:
        self.left = self.eta.update(values["step"])
        kept = {key: value for key, value in self.values.items() if key.startswith("loss/") and not is_number(values.get(key))}
        self.values = {**values, **kept}  # a modality without a target in this step keeps its last loss
        self.done = values["step"]

    def event(self, text: str) -> None:
        super().event(text)
        if found := SAVED.match(text):
            self.saved = (found.group(1), time.monotonic())
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def finished(self) -> None:
        self.live.stop()

    def _view(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1))
        for _ in range(3):
            head.add_column(no_wrap=True)
        head.add_row(ProgressBar(max(1, self.total), self.done, width=BAR_WIDTH), f"{self.done}/{self.total}", f"eta {format_seconds(self.left)}")
        lines = [Text(self.what, style="bold")]
        if self.values:
            saved = f"step {self.saved[0]}, {format_seconds(time.monotonic() - self.saved[1])} ago" if self.saved else "none yet"
            lines += [Text(describe_step(self.values)), Text(describe_pace(self.values)), Text(f"last checkpoint {saved}", style="dim")]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(lines[0], head, *lines[1:])


class Eta:
    """Seconds that are left, from the pace of this process since its first step (which is slower and does not count)."""

    def __init__(self, step: int, steps: int) -> None:
        self.steps = steps
        self.first: tuple[int, float] | None = None

    def update(self, step: int) -> float | None:
        """Call after every step; None while nothing is known."""
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
            return None
        return (now - self.first[1]) / (step - self.first[0]) * (self.steps - step)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def describe_step(values: Mapping[str, Any]) -> str:
    """Loss, norm and learning rate of a step; of a modality only where there is a loss."""
    losses = "".join(f" {name} {values[f'loss/{name}']:.4f}" for name in MODALITY_NAMES if is_number(values.get(f"loss/{name}")))
    return f"loss {values['loss']:.4f}{losses} norm {values['grad_norm']:.3f} lr {values['lr']:.2e}"


def describe_pace(values: Mapping[str, Any]) -> str:
    """How fast and how full: tokens per second, MFU where it is known, share of the step spent waiting for data, memory, skipped samples."""
    mfu = f" mfu {values['mfu']:.1%}" if is_number(values.get("mfu")) else ""
    wait = values["data_seconds"] / values["step_seconds"]
    return f"{values['tokens_per_second']:,.0f} tok/s{mfu} wait {wait:.0%} memory {values['memory_gib']:.1f} GiB skipped {values['skipped']}"


def format_seconds(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or `-` where it is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
