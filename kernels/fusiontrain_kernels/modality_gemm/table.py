"""Tiles of modality_gemm by compute capability and kernel: rows, columns, inner, warps, stages.

Written by kernels/benchmarks/tune.py. `configs.py` says what the numbers mean.
"""

TABLE: dict[int, dict[str, tuple[int, int, int, int, int]]] = {
    0: {
        "forward": (16, 16, 16, 4, 1),
        "dgrad": (16, 16, 16, 4, 1),
        "wgrad": (16, 16, 16, 4, 1),
        "wgrad_add": (16, 16, 16, 4, 1),
        "swiglu": (16, 16, 16, 4, 1),
    },
    80: {
        "forward": (128, 128, 64, 8, 3),
        "dgrad": (128, 128, 64, 8, 3),
        "wgrad": (128, 128, 64, 8, 3),
        "wgrad_add": (128, 128, 64, 8, 3),
        "swiglu": (128, 64, 64, 8, 3),
    },
    86: {
        "forward": (128, 128, 32, 8, 3),
        "dgrad": (128, 128, 32, 8, 3),
        "wgrad": (128, 128, 32, 8, 3),
        "wgrad_add": (128, 128, 32, 8, 3),
        "swiglu": (128, 64, 32, 8, 3),
    },
    90: {
        "forward": (128, 256, 64, 8, 3),
        "dgrad": (128, 256, 64, 8, 3),
        "wgrad": (128, 256, 64, 8, 3),
        "wgrad_add": (128, 128, 64, 8, 3),
        "swiglu": (128, 128, 32, 8, 3),
    },
    100: {
        "forward": (128, 256, 64, 8, 3),
        "dgrad": (128, 256, 64, 8, 3),
        "wgrad": (128, 256, 64, 8, 3),
        "wgrad_add": (128, 128, 64, 8, 3),
        "swiglu": (128, 128, 32, 8, 3),
    },
    120: {
        "forward": (128, 128, 32, 8, 3),
        "dgrad": (128, 128, 32, 8, 3),
        "wgrad": (128, 128, 32, 8, 3),
        "wgrad_add": (128, 128, 32, 8, 3),
        "swiglu": (128, 64, 32, 8, 3),
    },
}
