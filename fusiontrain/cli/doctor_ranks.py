"""Checks of `fusiontrain doctor` that need all ranks: shared storage, clocks, versions, the bandwidth of a collective. All ranks call them together."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusiontrain.cli.doctor_machine import Check

VISIBLE_WITHIN_SECONDS = 5.0
"""Network file systems keep a folder's listing for a while."""
LARGEST_SKEW_SECONDS = 1.0
ROUNDS = 5
PROBE_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
SLOW_GB = {"cpu": 0.02, "cuda": 5.0}


def over_ranks(ranks: Any, path: Path, quick: bool) -> Iterator[Check]:
    """Every check over the ranks of the group that this process is in; findings are the same on all ranks."""
    yield versions()
    yield shared_storage(path, ranks.rank)
    yield clock_skew()
    if not quick:
        yield bandwidth(ranks.device)


def versions() -> Check:
    """Whether all ranks run the same Python, torch and fusiontrain."""
    import torch

    from fusiontrain import __version__
    from fusiontrain.parallel.reduce import gather_objects

    found = gather_objects({"python": platform.python_version(), "torch": torch.__version__, "fusiontrain": __version__})
    differ = {name: [row[name] for row in found] for name in found[0] if len({row[name] for row in found}) > 1}
    if differ:
        words = "; ".join(f"{name} is {', '.join(values)} on ranks 0 to {len(values) - 1}" for name, values in differ.items())
        return Check("same versions", "fail", f"{words}: install the same on all machines")
    return Check("same versions", "ok", f"on all {len(found)} ranks")


def shared_storage(path: Path, rank: int) -> Check:
    """Whether every rank sees the file that every other rank has just written below `path`."""
    import torch.distributed as dist

    from fusiontrain.parallel.reduce import gather_objects

    nonce = gather_objects(os.urandom(8).hex())[0]
    mine = path / f".doctor-{nonce}-{rank}"
    problem = ""
    try:
        mine.write_text(nonce)
    except OSError as error:
        problem = error.strerror or str(error)
    dist.barrier()
    unseen = _unseen([path / f".doctor-{nonce}-{other}" for other in range(dist.get_world_size())], nonce)
    findings = gather_objects((problem, unseen))
    mine.unlink(missing_ok=True)
    lines = [f"rank {number} cannot write there ({reason})" for number, (reason, _) in enumerate(findings) if reason]
    lines += [f"rank {number} does not see the files of {_words(missing)}" for number, (_, missing) in enumerate(findings) if missing]
    if lines:
        return Check("shared storage", "fail", f"{path}: {'; '.join(lines[:8])}: checkpoints need a folder that all machines share, name one with --dir")
    return Check("shared storage", "ok", f"{path}: {len(findings)} ranks see each other's files")


def _unseen(paths: Sequence[Path], content: str) -> list[int]:
    deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
    while True:
        unseen = [number for number, path in enumerate(paths) if not (path.is_file() and path.read_text() == content)]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.1)


def clock_skew() -> Check:
    """How far the clocks of the ranks lie apart, after a barrier; the best of a few rounds, since a barrier ends at different times."""
    import torch.distributed as dist

    from fusiontrain.parallel.reduce import gather_floats

    rounds = []
    for _ in range(ROUNDS):
        dist.barrier()
        rounds.append([row[0] for row in gather_floats([time.time()])])
    times = min(rounds, key=lambda row: max(row) - min(row))
    return judge_clocks(times)


def judge_clocks(times: Sequence[float]) -> Check:
    """times: of every rank at the same moment, in seconds."""
    skew = max(times) - min(times)
    if skew <= LARGEST_SKEW_SECONDS:
        return Check("clocks", "ok", f"at most {skew:.3f} s apart")
    middle = sorted(times)[len(times) // 2]
    worst = max(range(len(times)), key=lambda number: abs(times[number] - middle))
    return Check("clocks", "warn", f"{skew:.1f} s apart, rank {worst} farthest; logs and file times will mislead: start chrony or ntpd")


def bandwidth(device: Any) -> Check:
    """All-reduce of one large tensor: its bytes over the seconds of the fastest of a few rounds."""
    import torch
    import torch.distributed as dist

    tensor = torch.ones(PROBE_BYTES[device.type] // 4, device=device)
    fastest = float("inf")
    for _ in range(ROUNDS):
        dist.barrier()
        begin = time.monotonic()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.monotonic() - begin)
        tensor.fill_(1)
    speed = PROBE_BYTES[device.type] / fastest / 1e9
    # The same words on all ranks: of the slowest.
    from fusiontrain.parallel.reduce import gather_floats

    speed = min(row[0] for row in gather_floats([speed]))
    slow = speed < SLOW_GB[device.type]
    words = f"{speed:.2f} GB/s for an all-reduce of {PROBE_BYTES[device.type] >> 20} MiB over {dist.get_world_size()} ranks"
    return Check("collective", "warn" if slow else "ok", words + ("; check NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME and the links" if slow else ""))


def merge(found: Sequence[Sequence[Check]]) -> list[Check]:
    """The findings of every rank as one list: what all say alike stands once, what some say names them."""
    order = list(dict.fromkeys(check.name for checks in found for check in checks))
    merged = []
    for name in order:
        ranks_of: dict[Check, list[int]] = {}
        for rank, checks in enumerate(found):
            for check in checks:
                if check.name == name:
                    ranks_of.setdefault(check, []).append(rank)
        statuses = {check.status for check in ranks_of}
        if statuses == {"ok"}:  # measured numbers differ a little everywhere
            merged.append(next(iter(ranks_of)))
            continue
        everyone = list(range(len(found)))
        merged += [check if who == everyone else Check(name, check.status, f"{_words(who)}: {check.detail}") for check, who in ranks_of.items()]
    return merged


def _words(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
