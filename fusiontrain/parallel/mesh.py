"""Who this process is among all ranks, and the device mesh that they form.

Axes, outermost first: `dp_replicate` (whole copies of the model) and `dp_shard` (ranks that share one copy).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fusiontrain.config.schema import ParallelConfig
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Per device. With CUDA the host's own numbers still travel over gloo, so counting them never waits for the device."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`; `local_` counts the processes of this machine only."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes the run's metrics."""
        return self.rank == 0


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that a launcher (torchrun) announced in `environment`; without one, a world of one.

    Raises UserError where the variables are incomplete or not numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: environment[name] for name in names if name in environment}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return Ranks(device=pick_device(0))
    try:
        rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
        local_rank, local_world_size = int(given.get("LOCAL_RANK", 0)), int(given.get("LOCAL_WORLD_SIZE", 1))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"environment: RANK and WORLD_SIZE must both be numbers, found {given}: start with torchrun, or unset them"
        ) from error
    if not 0 <= rank < world_size:
        raise UserError(f"environment: RANK={rank} must lie below WORLD_SIZE={world_size}: start with torchrun")
    return Ranks(rank, world_size, local_rank, local_world_size, pick_device(local_rank))


def pick_device(local_rank: int) -> torch.device:
    """The machine's CUDA device of that number if it has CUDA devices, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this machine has {torch.cuda.device_count()} CUDA devices, but local rank {local_rank} was started: "
            "start one process per device"
        )
    return torch.device("cuda", local_rank)


def set_threads(threads: int | None, ranks: Ranks) -> int:
    """Set, and return, the CPU threads of this process: `threads`, or the machine's cores shared by its processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    count = threads or max(1, cores // ranks.local_world_size)
    if ranks.device.type == "cpu":
        # With several threads, gathering the gradients of repeated rows adds them in any order, and a resumed run would differ in the last bit.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.set_num_threads(count)
    return count


@contextlib.contextmanager
def process_group(ranks: Ranks, parallel: ParallelConfig) -> Iterator[None]:
    """Join all ranks while the context is open; a group that already exists is used and left as it is.

    A world of one in float32 needs no group. In bfloat16 it gets one of its own without any network, because FSDP also casts the parameters
    (and moves them, with cpu_offload): one implementation, whatever the number of ranks.
    """
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if dist.is_initialized() or not needs_group(ranks.world_size, parallel):
        yield
        return
    timeout = timedelta(seconds=parallel.timeout_seconds)
    store = dist.HashStore() if ranks.world_size == 1 else None
    dist.init_process_group(BACKENDS[ranks.device.type], rank=ranks.rank, world_size=ranks.world_size, store=store, timeout=timeout)
    try:
        yield
        # A rank that leaves early closes the sockets of ranks that still read their last collective.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def needs_group(world_size: int, parallel: ParallelConfig) -> bool:
    """Whether this run shards its model, which takes a process group."""
    return world_size > 1 or parallel.precision != "float32" or parallel.cpu_offload or parallel.engine == "deepspeed"


def mesh_shape(parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Sizes of (dp_replicate, dp_shard) on `world_size` ranks; raises UserError where they do not multiply to it."""
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    for name, size in (("dp_replicate", replicate), ("dp_shard", shard)):
        if size != -1 and size < 1:
            raise UserError(f"parallel.{name}={size}: must be at least 1, or -1 for all remaining ranks")
        if size != -1 and world_size % size:
            raise UserError(f"parallel.{name}={size}: must divide the number of ranks, which is {world_size}: start as many or a multiple, or set it to -1")
    if replicate == shard == -1:
        raise UserError("parallel.dp_replicate and parallel.dp_shard are both -1: only one of them can be all remaining ranks")
    if shard == -1:
        shard = world_size // replicate
    if replicate == -1:
        replicate = world_size // shard
    if replicate * shard != world_size:
        raise UserError(
            f"parallel.dp_replicate={replicate} x parallel.dp_shard={shard} needs {replicate * shard} ranks, but "
            f"{world_size} are running: set dp_shard to -1, or start {replicate * shard} processes"
        )
    near = parallel.reshard_after_forward
    if isinstance(near, int) and shard > 1 and (near < 2 or near >= shard or shard % near):
        raise UserError(f"parallel.reshard_after_forward={near}: must divide the {shard} ranks that share one copy of the model, and be 2 or more and less")
    return replicate, shard


def build_mesh(parallel: ParallelConfig, ranks: Ranks) -> DeviceMesh | None:
    """The mesh that the model is spread over: ("dp_shard",), or ("dp_replicate", "dp_shard"); None where nothing is spread."""
    replicate, shard = mesh_shape(parallel, ranks.world_size)
    if not needs_group(ranks.world_size, parallel) or parallel.engine == "deepspeed":
        return None
    if replicate == 1:
        return init_device_mesh(ranks.device.type, (shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(ranks.device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
