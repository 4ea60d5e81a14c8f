"""Tile shapes per architecture, kernel and class of problem. All compile without spills for their architecture; none is searched at run time.

Three classes: 16-bit and at least a tile (table.py, which tune.py writes), 16-bit and smaller (SMALL), 32-bit (FLOAT32).

"wgrad_add" holds a tile of the old gradient beside the sum, so it has room for half the columns.
"""

from __future__ import annotations

from typing import NamedTuple

from fusiontrain_kernels.modality_gemm.table import TABLE


class Config(NamedTuple):
    """A tile of `rows` by `columns` of the result, `inner` elements of the sum a step."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


SMALL = Config(64, 64, 32, 4, 3)
"""Every kernel, every architecture: 16-bit problems too small for the tiles below."""

FLOAT32 = Config(64, 64, 16, 8, 2)
"""Every kernel, every architecture: float32 in full precision, which is for checks and not for speed."""

CONFIGS = {capability: {kernel: Config(*numbers) for kernel, numbers in row.items()} for capability, row in TABLE.items()}
"""By compute capability and kernel, for problems of at least one tile. 0 is the interpreter; 86 and 120 have 99 KiB of shared memory."""
