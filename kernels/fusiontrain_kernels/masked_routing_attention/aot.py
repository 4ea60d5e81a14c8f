"""What `make aot` compiles of masked_routing_attention: every row of its table, bfloat16, 32 query and 8 key heads, two slices."""

from __future__ import annotations

import math
from collections.abc import Iterator

import triton.language as tl

from fusiontrain_kernels._aot import Case
from fusiontrain_kernels._launch import nearest
from fusiontrain_kernels.masked_routing_attention import configs
from fusiontrain_kernels.masked_routing_attention import triton_kernels as kernels

_KERNELS = {
    "forward": kernels.forward_kernel,
    "delta": kernels.delta_kernel,
    "dq": kernels.dq_kernel,
    "dkdv": kernels.dkdv_kernel,
}
_HALVES = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")
_POINTERS = {"key_ranges": "*i32", "query_ranges": "*i32", "grad_rows": "*i32", "lse": "*fp32", "delta": "*fp32"}


def cases(architecture: int) -> Iterator[Case]:
    """Every kernel at every head dim."""
    for head_dim in (64, 96, 128, 256):
        for name in _KERNELS:
            padded = 128 if head_dim == 96 else head_dim
            yield case(name, head_dim, nearest(configs.TABLE, architecture)[name][padded])


def case(name: str, head_dim: int, config: configs.Config) -> Case:
    """The kernel called `name` as a model of `head_dim` launches it."""
    kernel = _KERNELS[name]
    scale = head_dim**-0.5
    values = {
        "H": 32, "GROUP": 4, "G": 2, "NUM_GRAD": 1, "SCALE": scale, "SCALE2": scale / math.log(2),
        "D": head_dim, "DP": max(64, 1 << (head_dim - 1).bit_length()), "BM": config.BM, "BN": config.BN, "ACC": tl.float32,
    }  # fmt: skip
    constants = {key: value for key, value in values.items() if key in kernel.arg_names}
    title = f"attention {name} D={head_dim} {config.BM}x{config.BN} w{config.num_warps} s{config.num_stages}"
    pointers = {**dict.fromkeys(_HALVES, "*bf16"), **_POINTERS}
    return Case(title, kernel, pointers, constants, config.num_warps, config.num_stages, ["num_rows"], tensor_cores=name != "delta")
