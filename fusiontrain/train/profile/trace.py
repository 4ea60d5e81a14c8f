"""A Chrome trace of torch.profiler, read back: the events with a beginning and an end."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPERATOR, ANNOTATION, KERNEL, COPY, FILL = "cpu_op", "user_annotation", "kernel", "gpu_memcpy", "gpu_memset"
ON_DEVICE = (KERNEL, COPY, FILL)
RUNTIME = ("cuda_runtime", "cuda_driver", "hip_runtime")
KINDS = (OPERATOR, ANNOTATION, *ON_DEVICE, *RUNTIME)


@dataclass(frozen=True)
class Event:
    """Times in whole nanoseconds since any moment, so that what ends as another begins does just that.

    sequence: of autograd, shared by an operator and its backward, -1 without one. backward: whether it is the latter. correlation: shared by a kernel
    and the call of the runtime that launched it.
    """

    name: str
    kind: str
    thread: Any
    start: int
    end: int
    sequence: int = -1
    backward: bool = False
    correlation: int = -1


def read_trace(path: Path) -> list[Event]:
    """The events of `torch.profiler.profile.export_chrome_trace`, by time."""
    return parse_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def parse_trace(entries: Iterable[dict[str, Any]]) -> list[Event]:
    """Events of entries in Chrome's format, by time."""
    found = [_event(entry) for entry in entries if entry.get("ph") == "X" and entry.get("cat") in KINDS]
    return sorted(found, key=lambda event: (event.start, -event.end))


def _event(entry: dict[str, Any]) -> Event:
    start, more = round(float(entry["ts"]) * 1000), entry.get("args", {})
    return Event(
        name=entry["name"],
        kind=entry["cat"],
        thread=entry.get("tid"),
        start=start,
        end=start + round(float(entry.get("dur", 0)) * 1000),
        sequence=int(more.get("Sequence number", -1)),
        backward=entry["name"].startswith("autograd::engine::evaluate_function"),
        correlation=int(more.get("correlation", -1)),
    )
