"""`fusiontrain doctor`: is this machine fit, and if not, what to do. One line per check."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fusiontrain.cli import doctor_machine
from fusiontrain.cli.common import add_json_argument, print_json, print_table
from fusiontrain.cli.doctor_machine import GIB, Check

MINIMUM_PYTHON, MINIMUM_TORCH = (3, 11), (2, 11)
ENOUGH_MEMORY_GIB = 6
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit stands, under cgroups of version 2 and 1."""
MEETING_SECONDS = 60
"""How long the ranks wait for each other."""

NEEDED = ("transformers", "webdataset", "tensorboard", "pydantic", "omegaconf", "pillow", "numpy", "safetensors", "tokenizers", "rich")
OPTIONAL = {
    "triton": "GPU kernels; comes with a CUDA build of torch",
    "diffusers": "pixels to latents by a VAE; pip install 'fusiontrain[vae]'",
    "flash-attn": "one more implementation of attention on GPUs; pip install 'fusiontrain[gpu]'",
    "simplejpeg": "JPEGs in less time; without it Pillow decodes them, with the same pixels or nearly so",
    "s3fs": "shards on S3; pip install 'fusiontrain[s3]'",
    "gcsfs": "shards on Google Cloud Storage; pip install 'fusiontrain[gcs]'",
}

@dataclass(frozen=True)
class Operator:
    """One operator on this machine's device: its key in the config's kernels section, what auto takes, and by implementation why it cannot
    run here, or None if it can."""

    key: str
    operator: str
    auto: str
    implementations: dict[str, str | None]


def add_parser(subparsers: Any) -> None:
    """Adds `doctor` to the program's subparsers."""
    parser = subparsers.add_parser("doctor", help="check this machine, or under torchrun all machines, and say what to do")
    parser.add_argument("--dir", metavar="FOLDER", help="where runs will be written; under torchrun all ranks must share it (default: the current folder)")
    parser.add_argument("--quick", action="store_true", help="leave out what takes seconds: bandwidths, and loading DeepSpeed")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 if a check failed, on any rank; the main rank prints."""
    folder = Path(args.dir) if args.dir else Path.cwd()
    checks, is_main = _over_ranks(folder, args.quick) if "WORLD_SIZE" in os.environ else (list(examine(folder, args.quick)), True)
    good = all(check.status != "fail" for check in checks)
    if is_main:
        kernels = find_kernels()
        if args.json:
            print_json({"ok": good, "checks": [asdict(check) for check in checks], "kernels": [asdict(operator) for operator in kernels]})
        else:
            print_table((check.status, check.name, check.detail) for check in checks)
            _print_kernels(kernels)
    return int(not good)


def examine(folder: Path, quick: bool = False) -> Iterator[Check]:
    """Every check of this machine in turn. A check that breaks is reported as failed, and the others still run."""
    checks: dict[str, Callable[[], Iterator[Check]]] = {
        "python": _python,
        "packages": _packages,
        "deepspeed": partial(_deepspeed, quick),
        "torch": _torch,
        "driver": doctor_machine.driver,
        "communication": _communication,
        "machine": _machine,
        "limits": lambda: doctor_machine.limits(_has_cuda()),
        "/dev/shm": doctor_machine.shared_memory,
        "folder": lambda: doctor_machine.folder(folder, quick),
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            # Here the error is the finding: an unloadable library may raise anything.
            yield Check(name, "fail", f"{type(error).__name__}: {error}; reinstall it")


def _over_ranks(folder: Path, quick: bool) -> tuple[list[Check], bool]:
    """The findings of all ranks, the same on each, and whether this is the main one."""
    from fusiontrain.cli.doctor_ranks import merge, over_ranks
    from fusiontrain.config.schema import ParallelConfig
    from fusiontrain.parallel.mesh import process_group, read_ranks
    from fusiontrain.parallel.reduce import gather_objects

    ranks = read_ranks()
    if ranks.world_size == 1:
        return list(examine(folder, quick)), True
    own = list(examine(folder, quick))
    try:
        with process_group(ranks, ParallelConfig(timeout_seconds=MEETING_SECONDS)):
            together = list(over_ranks(ranks, folder, quick))
            return [*merge(gather_objects(own)), *together], ranks.is_main
    except RuntimeError as error:
        # The group itself is what failed: each rank says what it knows.
        reason = str(error).strip().splitlines()[0]
        return [*own, Check("ranks", "fail", f"rank {ranks.rank}: {reason}; check GLOO_SOCKET_IFNAME, the firewall and the rendezvous")], True


def find_kernels() -> list[Operator]:
    """What each operator can use here; none where torch cannot be imported, which is a check of its own."""
    try:
        import torch

        from fusiontrain.models.kernels import OPERATORS
        from fusiontrain_kernels.choices import IMPLEMENTATIONS, best, obstacle
    except (ImportError, OSError):
        return []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keys = {operator: key for key, operator in OPERATORS.items()}
    return [
        Operator(keys.get(operator, "-"), operator, best(operator, device)[0], {name: obstacle(operator, name, device) for name in names})
        for operator, names in IMPLEMENTATIONS.items()
    ]


def _print_kernels(kernels: list[Operator]) -> None:
    print("\nkernels.<key>: implementations that can run here (-: an operator that no model uses)")
    print_table((operator.key, operator.operator, _describe(operator)) for operator in kernels)
    missing: dict[tuple[str, str], list[str]] = {}
    for operator in kernels:
        for name, why_not in operator.implementations.items():
            if why_not is not None:
                missing.setdefault((name, why_not), []).append(operator.operator if operator.key == "-" else operator.key)
    for (name, why_not), keys in missing.items():
        print(f"not {name} ({', '.join(keys)}): {why_not}")


def _describe(operator: Operator) -> str:
    usable = [name for name, why_not in operator.implementations.items() if why_not is None]
    return ", ".join(f"{name} (auto)" if name == operator.auto else name for name in usable)


def _python() -> Iterator[Check]:
    good = sys.version_info >= MINIMUM_PYTHON
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    yield Check("python", "ok" if good else "fail", platform.python_version() + ("" if good else f"; use {wanted} or newer"))


def _packages() -> Iterator[Check]:
    missing = [name for name in NEEDED if not _installed(name)]
    if missing:
        yield Check("packages", "fail", f"missing: {', '.join(missing)}; run make setup")
    else:
        yield Check("packages", "ok", ", ".join(f"{name} {_installed(name)}" for name in NEEDED))
    for name, use in OPTIONAL.items():
        yield Check(name, "ok" if _installed(name) else "warn", _installed(name) or f"not installed ({use})")
    if _shadowed():
        yield Check("kernels", "fail", "a folder called 'kernels' with an __init__.py hides the package of that name; rename or leave it")


def _deepspeed(quick: bool = False) -> Iterator[Check]:
    """Whether parallel.engine: deepspeed can be used: what is installed need not load."""
    if not _installed("deepspeed"):
        yield Check("deepspeed", "warn", "not installed (the ZeRO engine; pip install 'fusiontrain[deepspeed]')")
        return
    if quick:
        yield Check("deepspeed", "ok", f"{_installed('deepspeed')}, not loaded")
        return
    from fusiontrain.parallel.deepspeed import import_deepspeed
    from fusiontrain.parallel.mesh import pick_device
    from fusiontrain.utils.errors import UserError

    try:
        import_deepspeed(pick_device(0))
    except UserError as error:
        yield Check("deepspeed", "warn", str(error))
    else:
        yield Check("deepspeed", "ok", f"{_installed('deepspeed')}, loads; set parallel.engine=deepspeed and parallel.zero_stage")


def _torch() -> Iterator[Check]:
    import torch

    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    wanted = ".".join(map(str, MINIMUM_TORCH))
    yield Check("torch", "ok" if found >= MINIMUM_TORCH else "fail", torch.__version__ + ("" if found >= MINIMUM_TORCH else f"; use {wanted} or newer"))
    if not torch.cuda.is_available():
        yield Check("devices", "ok", "CPU only" if torch.version.cuda is None else "CPU only; torch has CUDA but finds no GPU: check nvidia-smi")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        good = torch.cuda.is_bf16_supported()
        detail = f"{device.name}, {device.total_memory / GIB:.0f} GiB, compute capability {device.major}.{device.minor}"
        yield Check(f"cuda:{index}", "ok" if good else "warn", detail + ("" if good else "; no bfloat16: set parallel.precision=float32"))


def _communication() -> Iterator[Check]:
    import torch
    from torch import distributed

    gloo = distributed.is_available() and distributed.is_gloo_available()
    yield Check("gloo", "ok" if gloo else "fail", "available" if gloo else "not in this torch; install a build with distributed")
    if torch.cuda.is_available():
        nccl = distributed.is_nccl_available()
        yield Check("nccl", "ok" if nccl else "fail", ".".join(map(str, torch.cuda.nccl.version())) if nccl else "not in this torch; install a CUDA build")


def _machine() -> Iterator[Check]:
    yield Check("cores", "ok", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    memory = _memory_gib()
    if memory is not None:
        enough = memory >= ENOUGH_MEMORY_GIB
        yield Check("memory", "ok" if enough else "warn", f"{memory:.1f} GiB" + ("" if enough else f"; the demo wants {ENOUGH_MEMORY_GIB}"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _installed(name: str) -> str:
    """The version of a package, or '' if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _shadowed() -> bool:
    spec = importlib.util.find_spec("kernels")
    return bool(spec and spec.origin and Path(spec.origin).parent == Path.cwd() / "kernels")


def _memory_gib() -> float | None:
    """Memory that this process may use: the container's limit where there is one, else the machine's."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in MEMORY_LIMITS:
        text = Path(limit).read_text().strip() if Path(limit).is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits) / GIB if limits else None
