"""Compiles the shipped Triton configurations for GPUs that are not here, and reads from the machine code what they need.

    python -m fusiontrain_kernels._aot [--json] [TARGET ...]        targets: cuda:80 cuda:90 cuda:100 (default: all three)

Exit code 1 if a kernel spills registers, wants more shared memory than a block may have, or lacks the target's tensor-core instructions.
An operator takes part with a file `aot.py` whose `cases(target) -> Iterable[Case]` lists its kernels. Needs only the Triton wheel, which
brings ptxas, cuobjdump and nvdisasm. TRITON_INTERPRET must not be set: it is read when a kernel is decorated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OPERATORS = ("masked_routing_attention", "modality_gemm", "rms_norm", "rope", "swiglu", "linear_cross_entropy")
TARGETS = {"cuda:80": 80, "cuda:90": 90, "cuda:100": 100}
SHARED_LIMIT = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024}
"""Bytes of shared memory that one block may ask for."""
TENSOR_CORE = {"cuda:80": r"\bmma\.sync", "cuda:90": r"\bwgmma\.mma_async", "cuda:100": r"\btcgen05\.mma"}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    arguments: Triton types of the arguments that are not constexpr, by name ("*bf16", "i32"). divisible: integers among them that are
    multiples of 16 in practice; pointers always are. Without it loads are not vectorised and another kernel is judged than the one that runs.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible: Sequence[str] = ()
    tensor_cores: bool = True


@dataclass
class Resources:
    """Of one compiled kernel. spills: instructions that load or store local memory; stack and shared in bytes."""

    case: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    mma: int
    faults: list[str] = field(default_factory=list)


def measure(case: Case, target: str) -> Resources:
    """Compiles `case` and judges it. Raises what the compiler raises."""
    compiled = _compile(case, target)
    registers, stack, spills = _read_cubin(compiled.asm["cubin"])
    mma = len(re.findall(TENSOR_CORE[target], compiled.asm["ptx"]))
    result = Resources(case.name, target, registers, stack, spills, compiled.metadata.shared, mma)
    if spills or stack:
        result.faults.append(f"spills: {spills} instructions, {stack} bytes of stack")
    if result.shared > SHARED_LIMIT[target]:
        result.faults.append(f"shared memory: {result.shared} bytes, at most {SHARED_LIMIT[target]}")
    if case.tensor_cores and not mma:
        result.faults.append("no tensor-core instruction")
    return result


def _compile(case: Case, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.arguments[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in case.divisible]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", TARGETS[target], 32), options=options)


def _read_cubin(cubin: bytes) -> tuple[int, int, int]:
    """Registers per thread, bytes of stack, and instructions that spill."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
        assembly = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), len(re.findall(r"\b(?:STL|LDL)(?:\.\S+)?\b", assembly))


def shipped_cases(target: str) -> Iterable[Case]:
    """What each operator with a file `aot.py` ships for `target`."""
    for operator in OPERATORS:
        module = f"fusiontrain_kernels.{operator}.aot"
        if find_spec(module) is not None:
            yield from import_module(module).cases(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fusiontrain_kernels._aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=" ".join(TARGETS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    if find_spec("triton") is None:
        parser.error("the package triton is not installed")
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; choose from {', '.join(TARGETS)}")
    results = []
    for target in options.targets:
        for case in shipped_cases(target):
            if options.only in case.name:
                results.append(measure(case, target))
                if not options.json:
                    _show(results[-1])
    if options.json:
        sys.stdout.write(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return int(any(result.faults for result in results) or not results)


def _show(result: Resources) -> None:
    verdict = "; ".join(result.faults) or "ok"
    sys.stdout.write(
        f"{result.target:9} {result.case:60} registers {result.registers:3}  shared {result.shared / 1024:5.1f} KiB  "
        f"spills {result.spills:3}  mma {result.mma:3}  {verdict}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
