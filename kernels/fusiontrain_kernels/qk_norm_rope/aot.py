"""What the gate compiles of qk_norm_rope and rope: query and key heads of 64, 128 and 256, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from fusiontrain_kernels._aot import Case
from fusiontrain_kernels.qk_norm_rope import triton_kernels as kernels
from fusiontrain_kernels.qk_norm_rope import triton_ops

M = 2  # modalities


def cases(architecture: int) -> Iterator[Case]:
    """The same for every architecture: bound by memory, no products."""
    del architecture
    pointers: dict[str, Any] = dict.fromkeys(("x", "cos", "sin", "out", "grad", "x_grad"), "*bf16")
    pointers |= {"weights": ("*bf16",) * M, "offsets": "*i32", "partials": "*fp32"}
    for num_heads, dim, norm in ((32, 64, True), (32, 128, True), (8, 128, True), (32, 256, True), (32, 128, False)):
        heads, block, warps = triton_ops.tile(num_heads, dim)
        constants: dict[str, Any] = {"M": M, "NORM": norm, "EPS": 1e-5, "ACC": tl.float32, "HEADS": heads, "BLOCK": block}
        name = f"{'qk norm ' * norm}rope {num_heads}x{dim}"
        yield Case(name, kernels.forward, pointers, constants, warps, 3, tensor_cores=False)
        constants |= {"PARTIALS": norm, "ROWS": triton_ops.ROWS}
        yield Case(f"{name} backward", kernels.backward, pointers, constants, warps, 3, tensor_cores=False)
