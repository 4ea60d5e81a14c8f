"""Checks of `fusiontrain doctor` that concern one machine: limits, shared memory, driver, disk."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MIB, GIB = 1024**2, 1024**3
FEWEST_FILES, ENOUGH_FILES = 512, 4096
LEAST_SHARED_MEMORY_MIB, ENOUGH_SHARED_MEMORY_GIB = 64, 1
"""Docker gives 64 MiB by default, on which NCCL and the loader's processes fail."""
ENOUGH_LOCKED_GIB, ENOUGH_DISK_GIB = 1, 5
PROBE_BYTES, SLOW_DISK_MB = 32 * MIB, 50

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding. `detail` says what was found and, unless the status is ok, what to do."""

    name: str
    status: Status
    detail: str


def limits(has_cuda: bool) -> Iterator[Check]:
    """What the shell allows a process: open files, locked memory, core dumps."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    status: Status = "ok" if files == resource.RLIM_INFINITY or files >= ENOUGH_FILES else "warn" if files >= FEWEST_FILES else "fail"
    yield Check("open files", status, _limit(files) + ("" if status == "ok" else "; shards, sockets and workers need more: ulimit -n 65536"))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    enough = not has_cuda or locked == resource.RLIM_INFINITY or locked >= ENOUGH_LOCKED_GIB * GIB
    yield Check("locked memory", "ok" if enough else "warn", _limit(locked) + ("" if enough else " bytes; RDMA locks its buffers: ulimit -l unlimited"))
    core = resource.getrlimit(resource.RLIMIT_CORE)[0]
    advice = "" if core == 0 else "; a crash may write all memory of a rank to the disk: ulimit -c 0"
    yield Check("core dumps", "warn" if core == resource.RLIM_INFINITY else "ok", _limit(core) + advice)


def shared_memory() -> Iterator[Check]:
    """/dev/shm, through which NCCL and the loader's processes pass data."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    status: Status = "ok" if free >= ENOUGH_SHARED_MEMORY_GIB * GIB else "warn" if free > LEAST_SHARED_MEMORY_MIB * MIB else "fail"
    advice = "" if status == "ok" else "; in a container give it more with --shm-size=16g or --ipc=host"
    yield Check("/dev/shm", status, f"{free / GIB:.2f} GiB free{advice}")


def driver() -> Iterator[Check]:
    """NVIDIA's driver, and whether torch can use it."""
    import torch

    program = shutil.which("nvidia-smi")
    if program is None:
        wanted = torch.version.cuda is not None
        advice = "; this torch is for CUDA: install one, or start the container with --gpus all" if wanted else ""
        yield Check("driver", "warn" if wanted else "ok", f"no NVIDIA driver{advice}")
        return
    result = subprocess.run([program, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=60)
    found = ", ".join(sorted(set(result.stdout.split("\n")) - {""}))
    if result.returncode:
        yield Check("driver", "fail", f"nvidia-smi: {' '.join((result.stdout + result.stderr).split())}; reinstall the driver or restart the machine")
    elif torch.version.cuda is None:
        yield Check("driver", "warn", f"{found}, but this torch is built for CPUs; install a CUDA build")
    elif not torch.cuda.is_available():
        yield Check("driver", "fail", f"{found}, but torch, built for CUDA {torch.version.cuda}, finds no usable GPU; install a newer driver")
    else:
        yield Check("driver", "ok", f"{found}, torch is built for CUDA {torch.version.cuda}")


def folder(path: Path, quick: bool) -> Iterator[Check]:
    """Whether checkpoints can be written to `path`, how much, and how fast."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            seconds = None if quick else _write(file.fileno())
    except OSError as error:
        yield Check("folder", "fail", f"{path} cannot be written ({error.strerror}); change to another, or name one with --dir")
        return
    free = shutil.disk_usage(path).free / GIB
    enough = free >= ENOUGH_DISK_GIB
    yield Check("folder", "ok" if enough else "warn", f"{path} is writable, {free:.0f} GiB free" + ("" if enough else "; checkpoints need more"))
    if seconds is not None:
        speed = PROBE_BYTES / 1e6 / seconds
        slow = speed < SLOW_DISK_MB
        advice = "; checkpoints will be slow: use a faster folder" if slow else ""
        yield Check("disk", "warn" if slow else "ok", f"{speed:.0f} MB/s written and synced{advice}")


def _write(file: int) -> float:
    """Seconds for PROBE_BYTES of noise, which no file system can compress, down to the disk."""
    block = os.urandom(MIB)
    begin = time.monotonic()
    for _ in range(PROBE_BYTES // MIB):
        os.write(file, block)
    os.fsync(file)
    return max(time.monotonic() - begin, 1e-9)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value}"
