"""Who is to blame for a hang, from what the ranks last wrote, and what a rank reports of itself."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusiontrain.parallel.mesh import Ranks, read_ranks
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.train import status as status_module
from fusiontrain.train.progress import PHASES, Progress
from fusiontrain.train.signals import StopRequest
from fusiontrain.train.status import Status, missing_ranks, own_start, read_statuses, sentence, speaker, write_status
from fusiontrain.train.watchdog import Watchdog, last_collective

HOST = socket.gethostname()
WRITTEN = 1_800_000_000.0


def status(rank: int, tick: int = 1, phase: str = "forward and backward", **values) -> Status:
    here = {"rank": rank, "host": HOST, "pid": os.getpid(), "started": own_start(), "written": WRITTEN}
    return Status(**{**here, "tick": tick, "step": 7, "phase": phase, "seconds": 9.0, **values})


def later(*statuses: Status, silent: tuple[int, ...] = ()) -> tuple[dict[int, Status], dict[int, Status]]:
    """What is read twice of ranks that are where they are; the silent ones have not written again."""
    return {one.rank: one for one in statuses}, {one.rank: one if one.rank in silent else replace(one, tick=one.tick + 1) for one in statuses}


@pytest.mark.parametrize(
    ("ranks", "silent", "expected"),
    [
        ([status(0), status(1, phase="data")], (), {1: "has been in data of step 7 for 9 s"}),
        ([status(0, collectives=12), status(1, collectives=11)], (), {1: "has been in forward and backward of step 7"}),
        ([status(0), status(1, step=6, phase="save")], (), {1: "save of step 6"}),
        ([status(0, phase="data"), status(1)], (1,), {1: "is stopped or cut off; it was last heard of in forward and backward of step 7, 40 s ago"}),
        ([status(0), status(1, started="1")], (), {1: f"process {os.getpid()} on {HOST} is gone; it was last heard of in forward and backward of step 7, 40"}),
        ([status(0), status(1, host="other", started="1", phase="optimizer")], (), {0: "forward and backward"}),
        ([status(0), status(1, failure="ValueError: no")], (), {1: "failed in forward and backward of step 7 with ValueError: no"}),
        ([status(0), status(2)], (), {1: "has written nothing"}),
        ([status(0), status(1), status(2)], (), {}),
    ],
    ids=["data", "collective", "step", "silent", "gone", "elsewhere", "failed", "nothing", "nobody"],
)
def test_the_ranks_that_others_wait_for(
    ranks: list[Status], silent: tuple[int, ...], expected: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module.time, "time", lambda: WRITTEN + 40.4)
    world_size = max(one.rank for one in ranks) + 1
    missing = missing_ranks(world_size, HOST, *later(*ranks, silent=silent))
    assert missing.keys() == expected.keys()
    assert all(words in missing[rank] for rank, words in expected.items())


def test_the_sentence_and_who_says_it() -> None:
    waiting = status(0, collective="gloo:all_gather number 3 of group 0")
    text = sentence(waiting, {1: "which is gone"})
    assert text == "rank 0 waited 9 s in forward and backward of step 7, gloo:all_gather number 3 of group 0 for rank 1, which is gone"
    assert sentence(waiting, {0: "me"}) == "rank 0 has been in forward and backward of step 7, gloo:all_gather number 3 of group 0 for 9 s"
    assert sentence(waiting, {}).endswith("for 9 s, and so have all others: is the network between them cut?")
    assert sentence(status(0, phase="data"), {}) == "rank 0 has been in data of step 7 for 9 s"
    assert sentence(waiting, dict.fromkeys(range(1, 9), "x")).endswith("rank 4, x; and 4 more")
    assert [speaker(3, missing) for missing in ([], [0], [0, 1], [0, 1, 2])] == [0, 1, 2, 0]


def test_statuses_are_read_back_and_damaged_ones_left_out(tmp_path: Path) -> None:
    write_status(tmp_path, status(0))
    (tmp_path / "rank-1.status.json").write_text("{")
    assert read_statuses(tmp_path, 3) == {0: status(0)}


def test_phases_add_up() -> None:
    progress = Progress()
    for step in (1, 2):
        for phase in PHASES[1:]:
            progress.enter(phase, step)
    assert progress.step == 2 and progress.phase == "save"
    assert progress.visits == dict.fromkeys(PHASES, 2) | {"start": 1, "save": 1}
    assert [line.split("  ")[0] for line in progress.table().splitlines()] == ["phase", *PHASES]


def use_collectives(folder: str) -> tuple[int, str, str, list[str]]:
    """Counted, and reported by a rank of its own."""
    for _ in range(3):
        torch.distributed.all_reduce(torch.ones(1))
    count, words = last_collective()
    torch.distributed.barrier()
    ranks = read_ranks()
    with Watchdog(Path(folder), ranks, Progress(), StopRequest(), 60, 60, print) as watchdog:
        watchdog.report()
        torch.distributed.barrier()
    logs, mine = Path(folder) / "logs", f"rank-{ranks.rank}"
    return count, words, (logs / f"{mine}.report.txt").read_text(), sorted(path.name for path in logs.glob(f"{mine}.*.json"))


def test_a_report_has_the_last_collective_the_timings_and_the_stacks(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for rank, (count, words, report, left) in enumerate(shared_pool().run(use_collectives, 2, str(tmp_path))):
        assert count >= 3 and words.startswith("gloo:all_reduce number ")
        assert f"rank {rank} on {HOST}" in report and "last collective: gloo:barrier" in report and "in use_collectives" in report
        assert left == [], "a rank that ends well leaves no status; the other one may not have ended yet"


def test_an_error_of_ones_own_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with Watchdog(tmp_path, Ranks(0, 2), Progress(), StopRequest(), 60, 60, print) as watchdog:
        watchdog.end_if_lost(ValueError("Connection closed"))
        watchdog.end_if_lost(RuntimeError("shape '[3]' is invalid"))


def hang(logs: Path, rank: int, phases: tuple[str, ...], said: int) -> None:
    """The end of a forked child: a rank of two that enters `phases` of step 7 and stays in the last one; what it says goes to a pipe."""
    progress = Progress()
    with Watchdog(logs.parent, Ranks(rank, 2), progress, StopRequest(), 1.0, 60, lambda text: os.write(said, text.encode()) and None):
        for phase in phases:
            progress.enter(phase, 7)
        time.sleep(60)
    os._exit(0)


def test_a_rank_that_hangs_ends_all_and_is_named_once(tmp_path: Path) -> None:
    """Rank 1 waits for data for ever, and rank 0 for rank 1, in something that has no limit of its own."""
    (tmp_path / "logs").mkdir()
    heard, said = os.pipe()
    children = []
    for rank, phases in enumerate((("optimizer", "forward and backward"), ("optimizer", "data"))):
        children.append(os.fork())
        if children[-1] == 0:
            hang(tmp_path / "logs", rank, phases, said)
    os.close(said)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [1, 1], "they did not sleep to the end"
    with os.fdopen(heard) as pipe:
        text = pipe.read()
    assert re.match(r"rank 0 waited \d+ s in forward and backward of step 7 for rank 1, ", text)
    process = f"whose process {children[1]} on {HOST} "  # it ends by itself too, before or after rank 0 has looked
    assert f"{process}has been in data of step 7 for " in text or f"{process}is gone; it was last heard of in data of step 7" in text
    assert text.count("rank 0 waited") == 1 and "rank 1 waited" not in text and "rank 1 has been" not in text


@pytest.mark.parametrize("told", [False, True])
def test_a_rank_that_tells_its_own_error_is_not_told_of_again(tmp_path: Path, told: bool) -> None:
    (tmp_path / "logs").mkdir()
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        with Watchdog(tmp_path, Ranks(0, 2), Progress(), StopRequest(), 60, 60, lambda text: os.write(said, text.encode()) and None) as watchdog:
            write_status(tmp_path / "logs", status(1, failure="UserError: no room", told=told))
            watchdog.end_if_lost(RuntimeError("Connection closed by peer"))
        os._exit(0)
    os.close(said)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, "it ends either way"
    with os.fdopen(heard) as pipe:
        assert pipe.read().endswith("for rank 1, which failed in forward and backward of step 7 with UserError: no room") is not told
