"""Numbers over all ranks. Every function is a plain pass-through where there is no process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fusiontrain.utils.errors import UserError

T = TypeVar("T")

SECONDS_BETWEEN_MEETINGS = 5.0


def sum_integers(values: Sequence[int]) -> list[int]:
    """Each value summed over all ranks (host numbers, exact up to 2**63)."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather_floats(values: Sequence[float]) -> list[list[float]]:
    """The values of every rank, [world_size][len(values)] float64 host numbers in order of rank."""
    if not dist.is_initialized():
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return [row.tolist() for row in rows]


def gather_bytes(mine: bytes) -> list[bytes]:
    """The bytes of every rank, in order of rank. All ranks call this together."""
    sizes = [int(size) for (size,) in gather_floats([len(mine)])]
    if not dist.is_initialized():
        return [mine]
    padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
    padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else 0
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded)
    return [bytes(row[:size].tolist()) for row, size in zip(rows, sizes, strict=True)]


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all ranks in place, on its device; the device is not waited for."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The (picklable) value of every rank, in order of rank. group: of all ranks, if the default one is in use elsewhere."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0 (picklable), on every rank; a UserError there is raised on all, so none waits."""
    if not dist.is_initialized():
        return function()
    holder: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            holder[0] = function()
        except UserError as error:
            holder[1] = str(error)
    dist.broadcast_object_list(holder, src=0)
    if holder[1] is not None:
        raise UserError(holder[1])
    return holder[0]


def at_length(function: Callable[[], None], chosen: bool, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Run what may take hours on the ranks that are `chosen`; the others wait for them. A UserError of one is raised on all.

    All ranks meet every few seconds meanwhile, so nobody waits longer than the group's timeout for a rank that has died, and call `meanwhile`.
    """
    if not dist.is_initialized():
        if chosen:
            function()
        return
    with ThreadPoolExecutor(1) as pool:
        running = [pool.submit(function)] if chosen else []
        while sum_integers([len(wait(running, timeout=SECONDS_BETWEEN_MEETINGS).not_done)])[0]:
            meanwhile()
    errors = [future.exception() for future in running]
    problems = [text for text in gather_objects(next((str(error) for error in errors if isinstance(error, UserError)), None)) if text is not None]
    if problems:
        raise UserError(problems[0])
    for error in filter(None, errors):
        raise error


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
