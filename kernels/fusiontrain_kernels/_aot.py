"""Compiles the shipped Triton configurations for GPUs that are not here, and reads from the machine code what they need.

    python -m fusiontrain_kernels._aot [--only TEXT] [--json] [TARGET ...]      default targets: cuda:80 cuda:90 cuda:100

Exit code 1 if a kernel spills registers, wants more shared memory than a block may have, or lacks the target's tensor-core instructions;
for hip:gfx942, which nobody has tuned, only if it does not compile. An operator takes part with a file `aot.py` whose
`cases(architecture) -> Iterable[Case]` lists its kernels. Needs only the Triton wheel, which brings ptxas, cuobjdump and nvdisasm.
TRITON_INTERPRET must not be set: it is read when a kernel is decorated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


class Target(NamedTuple):
    """architecture: what configs are chosen by. shared_limit: bytes of shared memory that one block may ask for. tensor_core: an instruction."""

    architecture: int
    shared_limit: int
    tensor_core: str
    gated: bool = True


TARGETS = {
    "cuda:80": Target(80, 163 * 1024, r"\bmma\.sync"),
    "cuda:86": Target(86, 99 * 1024, r"\bmma\.sync"),
    "cuda:90": Target(90, 227 * 1024, r"\bwgmma\.mma_async"),
    "cuda:100": Target(100, 227 * 1024, r"\btcgen05\.mma"),
    "cuda:120": Target(120, 99 * 1024, r"\bmma\.sync"),
    "hip:gfx942": Target(94, 64 * 1024, r"\bv_mfma_", gated=False),
}
DEFAULT_TARGETS = ("cuda:80", "cuda:90", "cuda:100")


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    pointers: Triton types of the pointers by argument name ("*bf16"), tuples of them for arguments that are tuples. What is neither there
    nor in `constants` is an i32. Pointers and integers are multiples of 16, as at the shapes of a real model, but for those named in
    `ragged`: without it loads are not vectorised and another kernel is judged than the one that runs.
    """

    name: str
    kernel: Any
    pointers: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    ragged: Sequence[str] = ()
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
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    read = _read_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else _read_amdgcn(assembly)
    mma = len(re.findall(TARGETS[target].tensor_core, assembly))
    result = Resources(case.name, target, *read, compiled.metadata.shared, mma)
    if result.spills or result.stack:
        result.faults.append(f"spills: {result.spills} instructions, {result.stack} bytes of stack")
    if result.shared > TARGETS[target].shared_limit:
        result.faults.append(f"shared memory: {result.shared} bytes, at most {TARGETS[target].shared_limit}")
    if case.tensor_cores and not mma:
        result.faults.append("no tensor-core instruction")
    return result


def _compile(case: Case, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.pointers.get(name, "i32") for name in names}
    aligned = [path for i, name in enumerate(names) for path in _leaves((i,), signature[name]) if name not in case.ragged]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    backend, _, architecture = target.partition(":")
    gpu = GPUTarget("cuda", int(architecture), 32) if backend == "cuda" else GPUTarget(backend, architecture, 64)
    return triton.compile(source, target=gpu, options={"num_warps": case.num_warps, "num_stages": case.num_stages})


def _leaves(path: tuple[int, ...], kind: Any) -> Iterator[tuple[int, ...]]:
    """Where the pointers and integers of an argument are."""
    if isinstance(kind, tuple):
        for i, entry in enumerate(kind):
            yield from _leaves((*path, i), entry)
    elif kind != "constexpr":
        yield path


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


def _read_amdgcn(assembly: str) -> tuple[int, int, int]:
    """Vector registers, bytes of scratch, and registers that spill."""
    found = [re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")]
    registers, scratch, spills = (int(match[1]) if match else 0 for match in found)
    return registers, scratch, spills


def shipped_cases(target: str) -> Iterable[Case]:
    """What each operator with a file `aot.py` ships for `target`."""
    for path in sorted(Path(__file__).parent.glob("*/aot.py")):
        yield from import_module(f"fusiontrain_kernels.{path.parent.name}.aot").cases(TARGETS[target].architecture)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fusiontrain_kernels._aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(DEFAULT_TARGETS), help=" ".join(TARGETS))
    parser.add_argument("--only", default="", help="cases whose name this regular expression matches")
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
            if re.search(options.only, case.name):
                results.append(measure(case, target))
                if not options.json:
                    _show(results[-1])
    if options.json:
        sys.stdout.write(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return int(any(result.faults and TARGETS[result.target].gated for result in results) or not results)


def _show(result: Resources) -> None:
    verdict = "; ".join(result.faults) or "ok"
    sys.stdout.write(
        f"{result.target:11}{result.case:46} registers {result.registers:3}  shared {result.shared / 1024:5.1f} KiB  "
        f"spills {result.spills:3}  mma {result.mma:3}  {verdict}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
