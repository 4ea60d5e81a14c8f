"""What the host was at, moment by moment: the innermost scope that is open, and whose backward a node of autograd is.

A node and the operator that made it share a sequence number, so a backward belongs to the scope in which its forward ran.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fusiontrain.train.profile.parts import BACKWARD, FORWARD, MODEL, MODEL_GROUPS, ONCE, RECOMPUTED, SHARDING, Call, whole
from fusiontrain.train.profile.trace import ANNOTATION, OPERATOR, Event

SCOPE = "fusiontrain: "
STEP = "fusiontrain step"
IN_FLIGHT = ("gloo:", "nccl:")
"""Beginnings of the names under which a process group says that a collective is on its way; they may outlast what started them."""

COMMUNICATION = ("c10d::", "_c10d_functional::", "c10d_functional::", "fsdp::all_gather", "record_param_comms")
"""Operators that start a collective or wait for one: their time is not work."""


@dataclass(frozen=True)
class Label:
    """A call, and in which phase."""

    call: Call
    phase: str

    @property
    def is_model(self) -> bool:
        """Whether it is a part of the model."""
        return self.call.group in MODEL_GROUPS

    @property
    def computes(self) -> bool:
        """Whether it computes even between its operators. An engine's hooks, which wait, run in what is left over of the model."""
        return self.is_model and self.call.group != MODEL


@dataclass(frozen=True)
class Moment:
    """A stretch of a thread in which nothing changes. operator: the innermost one that works, "" where none does."""

    start: int
    end: int
    label: Label | None
    operator: str


@dataclass
class _Frame:
    end: int
    label: Label | None
    operator: str
    in_backward: bool


@dataclass
class _Thread:
    """Events of one thread nest; walking through them in order with a stack gives its moments."""

    moments: list[Moment] = field(default_factory=list)
    stack: list[_Frame] = field(default_factory=list)
    now: int = 0

    def until(self, time: int) -> None:
        """Let time pass, and close what ends meanwhile."""
        while self.stack and self.stack[-1].end <= time:
            self._pass(self.stack[-1].end)
            self.stack.pop()
        self._pass(time)

    def _pass(self, time: int) -> None:
        if time > self.now:
            if self.stack:
                self.moments.append(Moment(self.now, time, self.stack[-1].label, self.stack[-1].operator))
            self.now = time


class Host:
    """The moments of every thread. calls: what the numbers in the names of scopes stand for."""

    def __init__(self, events: Iterable[Event], calls: Sequence[Call], main: object) -> None:
        self._calls, self._main = calls, main
        self._made_by: dict[int, Label] = {}
        threads: dict[object, _Thread] = {}
        for event in events:
            if event.kind in (OPERATOR, ANNOTATION) and not event.name.startswith((*IN_FLIGHT, STEP)):
                self._enter(threads.setdefault(event.thread, _Thread()), event)
        for thread in threads.values():
            thread.until(max((frame.end for frame in thread.stack), default=thread.now))
        self.moments: Mapping[object, list[Moment]] = {name: thread.moments for name, thread in threads.items()}
        self._starts = {name: [moment.start for moment in moments] for name, moments in self.moments.items()}

    def at(self, thread: object, time: int) -> Moment | None:
        """What a thread was at; None where it was at nothing."""
        place = bisect.bisect_right(self._starts.get(thread, []), time) - 1
        moment = self.moments[thread][place] if place >= 0 else None
        return moment if moment is not None and time < moment.end else None

    def _enter(self, thread: _Thread, event: Event) -> None:
        thread.until(event.start)
        if thread.stack and event.end > thread.stack[-1].end:
            return  # it does not nest: something that runs beside the thread
        outer = thread.stack[-1] if thread.stack else _Frame(0, None, "", False)
        label = self._label(event, outer)
        if event.sequence >= 0 and not event.backward and not outer.in_backward and event.thread == self._main and label is not None:
            self._made_by[event.sequence] = label  # of several with one number the last made the node: the others made none
        working = event.kind == OPERATOR and not event.name.startswith(COMMUNICATION)
        operator = (event.name if working else "") if event.kind == OPERATOR else ""
        thread.stack.append(_Frame(event.end, label, operator, outer.in_backward or event.backward))

    def _label(self, event: Event, outer: _Frame) -> Label | None:
        if event.kind == ANNOTATION and event.name.startswith(SCOPE):
            call = self._calls[int(event.name.rpartition("#")[2])]
            if call.group not in MODEL_GROUPS:
                return Label(call, ONCE)
            return Label(call, RECOMPUTED if outer.in_backward else FORWARD)
        if event.kind == ANNOTATION and event.name.startswith("FSDP::"):
            return Label(whole(SHARDING), ONCE)
        if event.backward:
            made_by = self._made_by.get(event.sequence)
            return Label(made_by.call if made_by else whole(MODEL), BACKWARD)
        return outer.label
