"""What `make aot` compiles of modality_gemm: every variant that is launched, at the tiles of its tables, two modalities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import triton.language as tl

from fusiontrain_kernels._aot import Case
from fusiontrain_kernels._launch import nearest
from fusiontrain_kernels.modality_gemm import triton_kernels as kernels
from fusiontrain_kernels.modality_gemm.configs import CONFIGS, FLOAT32, SMALL, Config
from fusiontrain_kernels.modality_gemm.triton_ops import GROUP

M = 2  # modalities


def cases(architecture: int) -> Iterator[Case]:
    """The architecture's own tiles, and those for small problems and for float32."""
    table = nearest(CONFIGS, architecture)
    yield from variants(table, "bf16")
    yield from variants(dict.fromkeys(table, SMALL), "bf16", even=False, label=" small")
    yield from variants(dict.fromkeys(table, FLOAT32), "fp32", even=False, label=" fp32")


def variants(table: dict[str, Config], dtype: str, even: bool = True, label: str = "") -> Iterator[Case]:
    """Of forward, dgrad, wgrad and SwiGLU."""
    pointer = f"*{dtype}"
    pair = (pointer,) * M
    for name, kernel, pairs, options in [
        ("forward", "forward", 1, {"HAS_BIAS": False, "TRANSPOSED": False}),
        ("forward bias", "forward", 1, {"HAS_BIAS": True, "TRANSPOSED": False}),
        ("dgrad", "dgrad", 1, {"HAS_BIAS": False, "TRANSPOSED": True}),
        ("dgrad of two", "dgrad", 2, {"HAS_BIAS": False, "TRANSPOSED": True}),
    ]:
        pointers = {"xs": (pointer,) * pairs, "weights": (pair,) * pairs, "biases": pair, "out": pointer}
        yield _case(name + label, kernels.gemm, table[kernel], dtype, pointers, {"PAIRS": pairs, "EVEN": even, **options})
    for name, kernel, out, options in [
        ("wgrad", "wgrad", pointer, {"HAS_BIAS": False, "ACCUMULATE": False}),
        ("wgrad bias", "wgrad", pointer, {"HAS_BIAS": True, "ACCUMULATE": False}),
        ("wgrad add", "wgrad_add", "*fp32", {"HAS_BIAS": False, "ACCUMULATE": True}),
    ]:
        pointers = {"x": pointer, "grad": pointer, "outs": (out,) * M, "bias_outs": (out,) * M}
        yield _case(name + label, kernels.wgrad, table[kernel], dtype, pointers, {"LIVE": 2**M - 1, **options})
    pointers = {"x": pointer, "gates": pair, "ups": pair, "gate_out": pointer, "up_out": pointer, "out": pointer}
    yield _case("swiglu" + label, kernels.gemm_swiglu, table["swiglu"], dtype, pointers, {"EVEN": even})


def _case(name: str, kernel: object, config: Config, dtype: str, pointers: Mapping[str, Any], options: Mapping[str, Any]) -> Case:
    tile = {"M": M, "ACC": tl.float32, "BM": config.rows, "BN": config.columns, "BK": config.inner, "GROUP": GROUP}
    pointers = {"offsets": "*i32", **pointers}
    return Case(f"gemm {name}", kernel, pointers, {**tile, **options}, config.warps, config.stages, tensor_cores=dtype == "bf16")
