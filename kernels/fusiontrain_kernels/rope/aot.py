"""What `make aot` compiles of rope: query and key heads of 128, and heads of 64, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from fusiontrain_kernels._aot import Case
from fusiontrain_kernels.rope import triton_kernels as kernels


def cases(architecture: int) -> Iterator[Case]:
    """The same for every architecture: bound by memory, no products."""
    del architecture
    pointers = dict.fromkeys(("x", "cos", "sin", "out"), "*bf16")
    for heads, half in ((32, 64), (8, 64), (32, 32)):
        constants = {"BACKWARD": False, "ACC": tl.float32, "HEADS": heads, "BLOCK": half}
        yield Case(f"rope {heads}x{2 * half}", kernels.turn, pointers, constants, min(max(heads * half // 256, 1), 8), tensor_cores=False)
