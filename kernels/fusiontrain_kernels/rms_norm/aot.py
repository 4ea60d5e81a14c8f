"""What `make aot` compiles of rms_norm: rows of the usual widths, with the residual, two modalities, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from fusiontrain_kernels._aot import Case
from fusiontrain_kernels.rms_norm import triton_kernels as kernels
from fusiontrain_kernels.rms_norm.triton_ops import COLUMNS, ROWS, STEP, num_warps

M = 2  # modalities
WIDTHS = (2048, 4096, 8192)


def cases(architecture: int) -> Iterator[Case]:
    """The same for every architecture: bound by memory, no products."""
    del architecture
    pair, common = ("*bf16",) * M, {"M": M, "ACC": tl.float32}
    rows = {"offsets": "*i32", "weights": pair, "rstds": "*fp32", "partials": "*fp32", "outs": pair}
    rows |= dict.fromkeys(("x", "residual", "out", "summed", "grad", "grad_summed", "x_grad"), "*bf16")
    for width in WIDTHS:
        constants = {**common, "BLOCK": width, "ADD": True}
        yield Case(f"rms_norm {width}", kernels.forward, rows, {**constants, "EPS": 1e-5}, num_warps(width), tensor_cores=False)
        constants |= {"PARTIALS": True, "ROWS": ROWS}
        yield Case(f"rms_norm backward {width}", kernels.backward, rows, constants, num_warps(width), tensor_cores=False)
    constants = {**common, "LIVE": 2**M - 1, "ROWS": ROWS, "BLOCK": COLUMNS, "STEP": STEP}
    yield Case("rms_norm partials", kernels.add_partials, rows, constants, 4, tensor_cores=False)
