"""What each rank says of itself in a small file of the run folder, and who is to blame when ranks wait in vain.

Files, because they are still there when a rank, or the rank that serves the group's store, no longer answers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fusiontrain.train.progress import PHASES


@dataclass(frozen=True)
class Status:
    """One rank at one moment.

    tick: goes up with every writing. started: when the process began, in the system's ticks, since process ids come back. collectives: how many this
    rank has begun, collective: the last one; failure: what it ended with, if it did; told: it says that itself. seconds: in this phase. written: when,
    in seconds since 1970.
    """

    rank: int
    host: str
    pid: int
    started: str
    tick: int
    step: int
    phase: str
    seconds: float
    collectives: int = 0
    collective: str = ""
    failure: str = ""
    told: bool = False
    written: float = 0.0

    @property
    def place(self) -> tuple[int, int, int]:
        """How far this rank has come: a larger one has come further."""
        return self.step, PHASES.index(self.phase), self.collectives

    def alive(self, host: str) -> bool:
        """False for a process of this host that is no longer there; of another host nothing is known, and it counts as alive."""
        return self.host != host or start_of(self.pid) == self.started


def status_path(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.status.json"


def write_status(logs: Path, status: Status) -> None:
    """Replace the rank's file in one step."""
    path = status_path(logs, status.rank)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(asdict(status)), encoding="utf-8")
    partial.replace(path)


def read_statuses(logs: Path, world_size: int) -> dict[int, Status]:
    """By rank; those that cannot be read are left out."""
    found = {}
    for rank in range(world_size):
        try:
            found[rank] = Status(**json.loads(status_path(logs, rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return found


def failure_of(error: BaseException) -> str:
    """What a status says of an error: its type and its first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


def start_of(pid: int) -> str:
    """When a process began, as /proc has it: empty where it is not there (or there is no /proc, and it is)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def own_start() -> str:
    return start_of(os.getpid())


def missing_ranks(world_size: int, host: str, before: Mapping[int, Status], now: Mapping[int, Status]) -> dict[int, str]:
    """The ranks that the others wait for, each with what is known of it.

    before, now: what was read twice, long enough apart that every rank that lives has written meanwhile. Ranks that are gone or do not answer come
    first; where there are none, those that have come least far.
    """
    absent: dict[int, str] = {}
    for rank in range(world_size):
        status = now.get(rank)
        if status is None:
            absent[rank] = "which has written nothing"
        elif status.failure:
            absent[rank] = f"which failed in {_where(status)} with {status.failure}"
        elif not status.alive(host):
            absent[rank] = f"whose process {status.pid} on {status.host} is gone; {_last_heard(status)}"
        elif rank in before and before[rank].tick == status.tick:
            absent[rank] = f"whose process {status.pid} on {status.host} is stopped or cut off; {_last_heard(status)}"
    if absent:
        return absent
    furthest = max(status.place for status in now.values())
    least = min(status.place for status in now.values())
    if least == furthest:
        return {}
    return {
        rank: f"whose process {status.pid} on {status.host} has been in {_where(status)} for {status.seconds:.0f} s"
        for rank, status in now.items()
        if status.place == least
    }


def _last_heard(status: Status) -> str:
    """Where a rank was that no longer writes: it may have gone on for a while after it last did."""
    return f"it was last heard of in {_where(status)}, {max(0.0, time.time() - status.written):.0f} s ago"


def _where(status: Status) -> str:
    return f"{status.phase} of step {status.step}" if status.step else status.phase


def sentence(waiting: Status, missing: Mapping[int, str]) -> str:
    """What happened, as the rank `waiting` saw it."""
    collective = f", {waiting.collective}" if waiting.collective else ""
    at = f"{_where(waiting)}{collective}"
    others = {rank: text for rank, text in missing.items() if rank != waiting.rank}
    if not others:
        network = "" if missing or not waiting.collective else ", and so have all others: is the network between them cut?"
        return f"rank {waiting.rank} has been in {at} for {waiting.seconds:.0f} s{network}"
    words = "; ".join(f"rank {rank}, {text}" for rank, text in list(others.items())[:4])
    more = f"; and {len(others) - 4} more" if len(others) > 4 else ""
    return f"rank {waiting.rank} waited {waiting.seconds:.0f} s in {at} for {words}{more}"


def speaker(world_size: int, missing: Sequence[int]) -> int:
    """The one rank that tells a person: the first that is not missing itself."""
    return next((rank for rank in range(world_size) if rank not in missing), 0)
