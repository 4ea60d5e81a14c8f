"""Mistakes that several ranks find: told once where all find the same one, and with its rank where one finds what the main rank does not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from fusiontrain.cli.common import note
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.parallel.mesh import Ranks

JOIN_SECONDS = 60.0
"""How long ranks that cannot start wait for each other."""
SAME_SECONDS = 3.0
"""How long a rank waits for the main one to fail with the same: they come from a collective, or from the same line of the program."""


class Told(Exception):
    """Ends a rank whose error has been told: it leaves the process group without waiting for the others, who may not have the same."""


def end_before_start(error: UserError, ranks: Ranks) -> None:
    """Tell of an error before the run's process group was there. The main rank tells at once, the others when they have heard of its."""
    from fusiontrain.config.schema import ParallelConfig
    from fusiontrain.parallel.mesh import process_group
    from fusiontrain.parallel.reduce import gather_objects

    if ranks.is_main:
        tell(error)
    try:
        with process_group(ranks, ParallelConfig(timeout_seconds=JOIN_SECONDS)):
            others = gather_objects(str(error))
            if not ranks.is_main and others[0] != str(error):
                tell(error, ranks.rank)
    except RuntimeError:  # the main rank did not come
        if not ranks.is_main:
            tell(error, ranks.rank)


def others_failed() -> bool:
    """Called by the ranks that can start, in the run's process group, before anything else: whether one is in `end_before_start`."""
    from fusiontrain.parallel.reduce import gather_objects

    return any(text is not None for text in gather_objects(None))


def tell_in_run(error: UserError, ranks: Ranks, logs: Path) -> None:
    """Tell of an error in the middle of a run, while the group is there: its end ends the others. logs: every rank has noted how it ended there."""
    from fusiontrain.train.status import failure_of, read_statuses

    if ranks.is_main:
        tell(error)
        return
    deadline, said = time.monotonic() + SAME_SECONDS, ""
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)
        said = next((status.failure for status in read_statuses(logs, 1).values()), "")
    if said.partition(": ")[2] != failure_of(error).partition(": ")[2]:
        tell(error, ranks.rank)


def tell(error: UserError, rank: int | None = None) -> None:
    """The sentences of an error on stderr."""
    whose = "" if rank is None else f"rank {rank}: "
    for line in str(error).splitlines():
        note(f"fusiontrain: error: {whose}{line}")
