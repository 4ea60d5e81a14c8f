"""The time of the profiled steps, divided: every instant goes to one cell, so that the cells sum to the steps.

On a GPU an instant belongs to the kernel that runs, whoever launched it; where only a collective runs, it is exposed; where nothing runs, the host says
what it waits for. On a CPU the host's own thread is what runs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fusiontrain.train.profile.host import IN_FLIGHT, STEP, Host, Label
from fusiontrain.train.profile.parts import COLLECTIVES, EVERYTHING, IDLE, ONCE, TO_DEVICE, Call, Cell, whole
from fusiontrain.train.profile.trace import ANNOTATION, COPY, ON_DEVICE, RUNTIME, Event

Interval = tuple[int, int]
"""Start and end, nanoseconds."""

Piece = tuple[int, int, Label]
"""Start, end, and to whom the time between them goes unless it is taken."""

NANO = 1e9

SYNCHRONIZES = ("Synchronize",)
SYNCHRONIZING_OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")
"""Operators for which the host waits for a GPU."""


@dataclass(frozen=True)
class Divided:
    """Of one rank, over all profiled steps, in seconds.

    hidden: collectives that ran beside something else. syncs: how often the host waited for the device, or on a CPU would have waited for a GPU, by
    what it was at.
    """

    steps: tuple[float, ...]
    cells: dict[Cell, float]
    hidden: float
    syncs: dict[str, int]


def divide(events: Sequence[Event], calls: Sequence[Call]) -> Divided:
    """Divide the steps of a trace. Raises ValueError where it holds none."""
    steps = [event for event in events if event.kind == ANNOTATION and event.name.startswith(STEP)]
    if not steps:
        raise ValueError(f"the trace holds no {STEP!r}")
    main = steps[0].thread
    host = Host(events, calls, main)
    windows = [(step.start, step.end) for step in steps]
    kernels = [event for event in events if event.kind in ON_DEVICE]
    flights = _union((e.start, e.end) for e in events if e.name.startswith(IN_FLIGHT) or (e.kind in ON_DEVICE and _is_collective(e)))
    layers = _device_layers(kernels, events, host, main) if kernels else _host_layers(host, main)
    exposed = Label(whole(COLLECTIVES), ONCE)
    layers.insert(-1, [(start, end, exposed) for start, end in flights])
    cells: defaultdict[Cell, float] = defaultdict(float)
    free, taken_by_collectives = windows, 0
    for layer in layers:
        taken, free = _take(free, layer)
        for start, end, label in taken:
            taken_by_collectives += (end - start) * (label is exposed)
            for cell, share in label.call.cells(label.phase).items():
                cells[cell] += (end - start) * share / NANO
    cells[Cell(IDLE, EVERYTHING, ONCE)] += sum(end - start for start, end in free) / NANO
    in_flight = sum(end - start for start, end, _ in _take(windows, [(start, end, exposed) for start, end in flights])[0])
    lengths = tuple((end - start) / NANO for start, end in windows)
    spent = {cell: seconds for cell, seconds in cells.items() if seconds > 0}
    return Divided(lengths, spent, (in_flight - taken_by_collectives) / NANO, _syncs(events, host, main, windows))


def _host_layers(host: Host, main: object) -> list[list[Piece]]:
    """What computes; then what else has a name."""
    moments = [moment for moment in host.moments[main] if moment.label is not None]
    works = [(m.start, m.end, m.label) for m in moments if m.label is not None and (m.operator or m.label.computes)]
    return [works, [(m.start, m.end, m.label) for m in moments if m.label is not None]]


def _device_layers(kernels: Sequence[Event], events: Sequence[Event], host: Host, main: object) -> list[list[Piece]]:
    """Kernels; copies; then what the host is at, but for the model: its calls are over long before its kernels."""
    launches = {event.correlation: event for event in events if event.kind in RUNTIME and event.correlation >= 0}
    computing: list[Piece] = []
    copying: list[Piece] = []
    for kernel in kernels:
        if _is_collective(kernel):
            continue
        launch = launches.get(kernel.correlation)
        moment = host.at(launch.thread, launch.start) if launch else None
        if kernel.kind == COPY and "HtoD" in kernel.name:
            copying.append((kernel.start, kernel.end, Label(whole(TO_DEVICE), ONCE)))
        else:
            computing.append((kernel.start, kernel.end, moment.label if moment and moment.label else Label(whole(IDLE), ONCE)))
    named = [(m.start, m.end, m.label) for m in host.moments[main] if m.label is not None and not m.label.is_model]
    return [_one_at_a_time(computing), _one_at_a_time(copying), named]


def _is_collective(event: Event) -> bool:
    return "nccl" in event.name.lower() or "rccl" in event.name.lower()


def _one_at_a_time(pieces: Sequence[Piece]) -> list[Piece]:
    """Of pieces that overlap, as kernels of several streams do, the one that started first keeps the time."""
    found: list[Piece] = []
    now = 0
    for start, end, label in sorted(pieces, key=lambda piece: piece[:2]):
        if end > now:
            found.append((max(start, now), end, label))
            now = end
    return found


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _take(free: Sequence[Interval], layer: Sequence[Piece]) -> tuple[list[Piece], list[Interval]]:
    """What a layer takes of the free time, and what stays free. Both are in order and do not overlap."""
    taken: list[Piece] = []
    left: list[Interval] = []
    pieces = iter(layer)
    piece = next(pieces, None)
    for start, end in free:
        now = start
        while piece is not None and piece[0] < end:
            low, high = max(piece[0], now), min(piece[1], end)
            if high > low:
                taken.append((low, high, piece[2]))
                left.extend(_if_any(now, low))
                now = high
            if piece[1] > end:
                break
            piece = next(pieces, None)
        left.extend(_if_any(now, end))
    return taken, left


def _if_any(start: int, end: int) -> Iterator[Interval]:
    if end > start:
        yield start, end


def _syncs(events: Sequence[Event], host: Host, main: object, windows: Sequence[Interval]) -> dict[str, int]:
    found: Counter[str] = Counter()
    on_gpu = any(event.kind in RUNTIME for event in events)
    for event in events:
        waits = event.kind in RUNTIME and any(word in event.name for word in SYNCHRONIZES)
        would_wait = not on_gpu and event.name in SYNCHRONIZING_OPERATORS
        if (waits or would_wait) and any(start <= event.start < end for start, end in windows):
            moment = host.at(event.thread, event.start)
            if moment is not None and moment.label is not None and (waits or moment.label.is_model):
                found[f"{event.name} in {moment.label.call.group}, {moment.label.phase}"] += 1
            elif waits:
                found[f"{event.name} between the parts"] += 1
    return dict(found)
