"""What `make aot` compiles of swiglu: bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from fusiontrain_kernels._aot import Case
from fusiontrain_kernels.swiglu import triton_kernels as kernels
from fusiontrain_kernels.swiglu.triton_ops import BLOCK


def cases(architecture: int) -> Iterator[Case]:
    """The same for every architecture: bound by memory, no products."""
    del architecture
    pointers = dict.fromkeys(("gate", "up", "out", "grad", "gate_grad", "up_grad"), "*bf16")
    for name, kernel in (("swiglu", kernels.forward), ("swiglu backward", kernels.backward)):
        yield Case(name, kernel, pointers, {"ACC": tl.float32, "BLOCK": BLOCK}, 4, tensor_cores=False)
