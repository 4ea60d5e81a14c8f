"""What `make aot` compiles of qk_norm_rope: heads of usual widths with the norm, and rope alone; two modalities, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from fusiontrain_kernels._aot import Case
from fusiontrain_kernels.qk_norm_rope import triton_kernels as kernels
from fusiontrain_kernels.qk_norm_rope.triton_ops import ROWS, tile

M = 2  # modalities
HEADS = ((32, 64), (32, 128), (8, 128), (32, 256))
"""Number and width of heads."""


def cases(architecture: int) -> Iterator[Case]:
    """The same for every architecture: bound by memory, no products."""
    del architecture
    rows = {"offsets": "*i32", "weights": ("*bf16",) * M, "partials": "*fp32"}
    rows |= dict.fromkeys(("x", "cos", "sin", "out", "grad", "x_grad"), "*bf16")
    for num_heads, width, norm in [*((*heads, True) for heads in HEADS), (32, 128, False)]:
        heads, block, warps = tile(num_heads, width)
        name = f"{'qk norm ' * norm}rope"
        constants = {"M": M, "NORM": norm, "EPS": 1e-5, "ACC": tl.float32, "HEADS": heads, "BLOCK": block}
        yield Case(f"{name} {num_heads}x{width}", kernels.forward, rows, constants, warps, tensor_cores=False)
        constants |= {"PARTIALS": norm, "ROWS": ROWS}
        yield Case(f"{name} backward {num_heads}x{width}", kernels.backward, rows, constants, warps, tensor_cores=False)
