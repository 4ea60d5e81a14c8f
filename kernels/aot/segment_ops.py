"""The gate for modality_gemm, rms_norm, swiglu, rope and linear_cross_entropy: python kernels/aot/segment_ops.py [--arch 90] [--only dgrad]

Exits with 1 if any config of the tables spills, overflows or misses the tensor cores.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator

import triton.language as tl
from gate import SHARED_KIB, Row, report

from fusiontrain_kernels._launch import nearest
from fusiontrain_kernels.linear_cross_entropy import triton_kernels as loss
from fusiontrain_kernels.modality_gemm import triton_kernels as gemm
from fusiontrain_kernels.modality_gemm.configs import CONFIGS, FLOAT32, SMALL, Config
from fusiontrain_kernels.rms_norm import triton_kernels as norm
from fusiontrain_kernels.rms_norm import triton_ops as norm_ops
from fusiontrain_kernels.rope import triton_kernels as rope
from fusiontrain_kernels.swiglu import triton_kernels as swiglu
from fusiontrain_kernels.swiglu.triton_ops import BLOCK as SWIGLU_BLOCK

M = 2  # modalities
SIZES = ("T", "N", "K", "D", "H", "V", "F", "HALF")
ROWS_OF = ("x", "w", "grad", "residual", "summed", "gate", "up", "row", "head", "cos", "sin", "logits")


def signature(dtype: str, **pointers: object) -> dict[str, object]:
    """All sizes and strides, the offsets, and the pointers: names of `dtype` unless said."""
    integers = (*SIZES, *(f"stride_{name}" for name in ROWS_OF))
    return {**dict.fromkeys(integers, "i32"), "offsets": "*i32", **{name: f"*{dtype}" if kind is True else kind for name, kind in pointers.items()}}


def tile(config: Config) -> dict[str, object]:
    return {"M": M, "ACC": tl.float32, "BM": config.rows, "BN": config.columns, "BK": config.inner, "GROUP": 8}


def gemm_rows(configs: dict[str, Config], dtype: str, even: bool = True, label: str = "") -> Iterator[Row]:
    """Every variant that triton_ops launches, at these tiles."""
    pointer, masters = f"*{dtype}", ("*fp32",) * M
    pair = (pointer,) * M
    cores = dtype == "bf16"
    for name, kernel, pairs, options in [
        ("forward", "forward", 1, {"HAS_BIAS": False, "TRANSPOSED": False}),
        ("forward bias", "forward", 1, {"HAS_BIAS": True, "TRANSPOSED": False}),
        ("dgrad", "dgrad", 1, {"HAS_BIAS": False, "TRANSPOSED": True}),
        ("dgrad of two", "dgrad", 2, {"HAS_BIAS": False, "TRANSPOSED": True}),
    ]:
        config = configs[kernel]
        sig = signature(dtype, xs=(pointer,) * pairs, weights=(pair,) * pairs, biases=pair, out=True)
        yield Row(f"{name}{label}", gemm.gemm, sig, {**tile(config), "PAIRS": pairs, "EVEN": even, **options}, config.warps, config.stages, cores)
    for name, kernel, outs, options in [
        ("wgrad", "wgrad", pair, {"HAS_BIAS": False, "ACCUMULATE": False}),
        ("wgrad bias", "wgrad", pair, {"HAS_BIAS": True, "ACCUMULATE": False}),
        ("wgrad add", "wgrad_add", masters, {"HAS_BIAS": False, "ACCUMULATE": True}),
    ]:
        config = configs[kernel]
        sig = signature(dtype, x=True, grad=True, outs=outs, bias_outs=outs)
        yield Row(f"{name}{label}", gemm.wgrad, sig, {**tile(config), "LIVE": 2**M - 1, **options}, config.warps, config.stages, cores)
    config = configs["swiglu"]
    sig = signature(dtype, x=True, gates=pair, ups=pair, gate_out=True, up_out=True, out=True)
    yield Row(f"gemm swiglu{label}", gemm.gemm_swiglu, sig, {**tile(config), "EVEN": even}, config.warps, config.stages, cores)


def norm_rows(dim: int, block: int) -> Iterator[Row]:
    """rms_norm over rows of `dim`, forward with the residual and backward."""
    pair, common = ("*bf16",) * M, {"M": M, "ACC": tl.float32, "BLOCK": block}
    warps = norm_ops.num_warps(block)
    sig = signature("bf16", x=True, residual=True, weights=pair, out=True, summed=True, rstds="*fp32")
    yield Row(f"rms_norm {dim}", norm.forward, sig, {**common, "EPS": 1e-5, "ADD": True}, warps, tensor_cores=False)
    sig = signature("bf16", grad=True, grad_summed=True, x=True, weights=pair, rstds="*fp32", x_grad=True, partials="*fp32")
    options = {"ADD": True, "PARTIALS": True, "ROWS": norm_ops.ROWS}
    yield Row(f"rms_norm backward {dim}", norm.backward, sig, {**common, **options}, warps, tensor_cores=False)


def rowwise_rows() -> Iterator[Row]:
    """The kernels without a product: they are bound by memory and need no tensor cores."""
    for dim in (2048, 4096, 8192):
        yield from norm_rows(dim, dim)
    options = {"M": M, "LIVE": 2**M - 1, "ACC": tl.float32, "ROWS": norm_ops.ROWS, "BLOCK": norm_ops.COLUMNS, "STEP": norm_ops.STEP}
    yield Row("rms_norm partials", norm.add_partials, signature("bf16", partials="*fp32", outs=("*bf16",) * M), options, 4, tensor_cores=False)
    elementwise = {"ACC": tl.float32, "BLOCK": SWIGLU_BLOCK}
    yield Row("swiglu", swiglu.forward, signature("bf16", gate=True, up=True, out=True), elementwise, 4, tensor_cores=False)
    sig = signature("bf16", grad=True, gate=True, up=True, gate_grad=True, up_grad=True)
    yield Row("swiglu backward", swiglu.backward, sig, elementwise, 4, tensor_cores=False)
    for heads, half in [(32, 64), (8, 64), (32, 32)]:
        sig, options = signature("bf16", x=True, cos=True, sin=True, out=True), {"BACKWARD": False, "ACC": tl.float32, "HEADS": heads, "BLOCK": half}
        yield Row(f"rope {heads}x{2 * half}", rope.turn, sig, options, min(max(heads * half // 256, 1), 8), tensor_cores=False)
    sig = signature("bf16", logits=True, labels="*i64", loss_weights="*fp32", losses="*fp32")
    options = {"Z_LOSS": 0.0, "DIFFERENTIATE": True, "ACC": tl.float32, "BLOCK": loss.BLOCK}
    yield Row("softmax loss", loss.softmax_loss, sig, options, loss.WARPS, tensor_cores=False)


def rows(capability: int) -> Iterator[Row]:
    """All of them, with the tables of `capability`."""
    small, wide = (dict.fromkeys(nearest(CONFIGS, capability), config) for config in (SMALL, FLOAT32))
    yield from gemm_rows(nearest(CONFIGS, capability), "bf16")
    yield from gemm_rows(small, "bf16", even=False, label=" small")
    yield from gemm_rows(wide, "fp32", even=False, label=" fp32")
    yield from rowwise_rows()


def main() -> int:
    """The number of configs that must not ship."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=list(SHARED_KIB), help="compute capability; default 80, 90 and 100")
    parser.add_argument("--only", action="append", help="regular expression for names of kernels")
    arguments = parser.parse_args()
    failures = 0
    for capability in arguments.arch or (80, 90, 100):
        for row in rows(capability):
            if arguments.only and not re.search("|".join(arguments.only), row.name):
                continue
            found = report(row, capability)
            failures += bool(found["problems"])
            state = "; ".join(found["problems"]) or "ok"
            sys.stdout.write(f"sm_{capability:<4}{row.name:26}{found['registers']:4} registers {found['shared']:7} bytes shared  {state}\n")
            sys.stdout.flush()
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
