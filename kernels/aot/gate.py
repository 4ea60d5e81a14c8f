"""Compile Triton kernels for GPUs that are not here, and read from the machine code whether they fit.

A kernel passes if it spills nothing, stays within its architecture's shared memory and, where it multiplies, uses tensor cores. The
Triton wheel has all it takes: ptxas, cuobjdump, nvdisasm.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
"""Most shared memory of one block, by compute capability."""
TENSOR_CORE = {80: r"\bmma\.sync", 86: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma", 120: r"\bmma\.sync"}


@dataclass(frozen=True)
class Row:
    """One kernel as one architecture launches it. `signature`: argument -> "*bf16", "i32", or a tuple of them; the rest are constexprs."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    tensor_cores: bool = True
    ragged: tuple[str, ...] = field(default=())  # arguments that need not be multiples of 16


def compile_row(row: Row, capability: int) -> Any:
    """The compiled kernel. Pointers and sizes count as multiples of 16, as Triton sees them at the shapes of a real model."""
    names = row.kernel.arg_names
    signature = {name: "constexpr" if name in row.constants else row.signature[name] for name in names}
    attributes: dict[tuple[int, ...], list] = {}

    def mark(path: tuple[int, ...], value: Any, name: str) -> None:
        if isinstance(value, tuple):
            for i, entry in enumerate(value):
                mark((*path, i), entry, name)
        elif value.startswith("*") or (value == "i32" and name not in row.ragged):
            attributes[path] = [["tt.divisibility", 16]]

    for i, name in enumerate(names):
        mark((i,), signature[name], name)
    constants = {(names.index(name),): value for name, value in row.constants.items()}
    source = ASTSource(fn=row.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": row.warps, "num_stages": row.stages})


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """-> resource usage, instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = [["cuobjdump", "-res-usage"], ["nvdisasm", "-c"]]
        usage, code = (subprocess.run([BIN / tool, flag, path], capture_output=True, text=True, check=True).stdout for tool, flag in commands)
    return usage, code


def report(row: Row, capability: int) -> dict[str, Any]:
    """What the kernel takes of the machine, and under "problems" why it must not ship."""
    compiled = compile_row(row, capability)
    usage, code = _disassemble(compiled.asm["cubin"])
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert match is not None, usage
    registers, stack, local = (int(number) for number in match.groups())
    spills = len(re.findall(r"\b(?:STL|LDL)(?:\.\S+)?\b", code))
    products = len(re.findall(TENSOR_CORE[capability], compiled.asm["ptx"]))
    shared = compiled.metadata.shared
    problems = []
    if spills or stack or local:
        problems.append(f"spills: {spills} instructions, {stack} bytes of stack")
    if shared > SHARED_KIB[capability] * 1024:
        problems.append(f"shared memory: {shared} of {SHARED_KIB[capability] * 1024}")
    if row.tensor_cores and not products:
        problems.append("no tensor-core instruction")
    return {"registers": registers, "shared": shared, "spills": spills, "products": products, "problems": problems}
