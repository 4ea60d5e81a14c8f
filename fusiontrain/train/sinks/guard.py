"""What stands between a run and its trackers: one that fails or hangs is reported once, counted, and never waited for."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusiontrain.train.sinks.sink import Sink

logger = logging.getLogger(__name__)

MOST_WAITING = 1000
"""Calls that wait for a tracker before further ones are lost."""
CLOSE_SECONDS = 60.0
"""How long the end of a run waits for what is still to be sent."""

Call = Callable[[], None]


class Guard:
    """One sink, opened at its first call and again after a failure to. A remote one lives in a thread of its own.

    `failures` counts the calls that were lost. A file of the run folder holds the id of a remote run and the last step that was sent to it, by
    which a run that is resumed after `step` goes on with it and repeats none.
    """

    def __init__(self, sink: Sink, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        self.sink, self.failures = sink, 0
        self._config, self._notes, self._opened = config, folder / f"{sink.name}-run.json", False
        noted = json.loads(self._notes.read_text(encoding="utf-8")) if sink.remote and step and self._notes.exists() else {}
        self._id, self._sent = noted.get("id"), noted.get("step", 0)
        self._news: list[str] = []
        self._calls: queue.Queue[Call | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"metrics to {sink.name}", daemon=True) if sink.remote else None
        if self._thread is not None:
            self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        def send() -> None:
            self._note(step)  # before it is sent: a kill in between loses a step there rather than repeat it
            self.sink.scalars(step, values)

        if step > self._sent:
            self._call(send)

    def pictures(self, step: int, prompts: Sequence[str], pictures: Sequence[np.ndarray], sheet: Image.Image) -> None:
        if step > self._sent:
            self._call(lambda: self.sink.pictures(step, prompts, pictures, sheet))

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._call(lambda: self.sink.text(step, tag, markdown))

    def news(self) -> list[str]:
        """Sentences for the person at the terminal since the last time."""
        taken, self._news = self._news, []
        return taken

    def close(self) -> None:
        """End the tracker's run. What cannot be sent in CLOSE_SECONDS is lost, and counted."""
        if self._thread is None:
            self._close()
        else:
            try:
                self._calls.put(None, timeout=CLOSE_SECONDS)
                self._thread.join(CLOSE_SECONDS)
            except queue.Full:
                pass
            if self._thread.is_alive():
                self._lost("does not answer", self._calls.qsize())
        if self.failures > 1:
            self._news.append(f"metrics.sinks: {self.sink.name} lost {self.failures} calls; metrics.jsonl has every step")

    def _call(self, function: Call) -> None:
        if self._thread is None:
            self._try(function)
            return
        try:
            self._calls.put_nowait(function)
        except queue.Full:
            self._lost(f"does not answer: {MOST_WAITING} calls wait for it")

    def _work(self) -> None:
        while (function := self._calls.get()) is not None:
            self._try(function)
        self._close()

    def _try(self, function: Call) -> None:
        try:
            if not self._opened:
                self._id = self.sink.open(self._id, self._config)
                self._opened = True
            function()
        except Exception as error:  # of a foreign package: whatever it is, the training goes on
            self._lost(f"{type(error).__name__}: {error}")

    def _close(self) -> None:
        if self._opened:
            self._try(self.sink.close)

    def _note(self, step: int) -> None:
        if self.sink.remote:
            partial = self._notes.with_name(f"{self._notes.name}.tmp")
            partial.write_text(json.dumps({"id": self._id, "step": step}), encoding="utf-8")
            partial.replace(self._notes)

    def _lost(self, why: str, count: int = 1) -> None:
        self.failures += count
        logger.warning("metrics.sinks: %s: %s", self.sink.name, why)
        if self.failures == count:
            self._news.append(f"metrics.sinks: {self.sink.name}: {why.splitlines()[0]}; the run goes on, further failures are counted in sink_failures")
