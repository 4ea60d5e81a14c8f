"""The tests of the Triton kernels can fail: each of these faults, put into a copy of a kernel's source, is found by one of them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import fusiontrain_kernels
from tests.kernels import test_linear_cross_entropy_chunked as loss
from tests.kernels import test_masked_routing_attention_triton as attention
from tests.kernels import test_modality_gemm_triton as gemm
from tests.kernels import test_qk_norm_rope as heads
from tests.kernels import test_rowwise_triton as rows
from tests.kernels.attention_layouts import layout

PACKAGE = Path(fusiontrain_kernels.__file__).parent
KERNELS = ["_segment_kernels", *(f"{operator}.triton_kernels" for operator in (
    "masked_routing_attention", "modality_gemm", "rms_norm", "qk_norm_rope", "swiglu", "linear_cross_entropy"))]  # fmt: skip
"""The first before those that import from it."""
LAUNCHES = ["masked_routing_attention.triton_op", *(f"{operator}.triton_ops" for operator in ("modality_gemm", "rms_norm", "qk_norm_rope", "swiglu"))]
for _name in LAUNCHES:  # now, or one would keep a copy that it finds at its first use
    importlib.import_module(f"fusiontrain_kernels.{_name}")

Test = Callable[[], None]
MIXED = (5, 0, 18)
TESTS: dict[str, Test] = {
    "gemm": lambda: gemm.test_gemm_in_float64(MIXED, True),
    "accumulate": lambda: gemm.test_gradients_add_to_float32_main_gradients_and_frozen_ones_stay_untouched(),
    "gemm swiglu": lambda: gemm.test_swiglu_epilogue_in_float64(MIXED),
    "norm": lambda: rows.test_rms_norm_in_float64(MIXED, True),
    "heads": lambda: heads.test_layouts_in_float64("triton", (9, 0, 12)),
    "swiglu": lambda: rows.test_swiglu(torch.float64, 1e-12, (33, 40)),
    "loss": lambda: loss.test_equals_the_formula("triton", 21, torch.float64, 1e-12, 0.01),
    "attention": lambda: attention.check(layout([[(0, 9), (1, 17), (2, 5), (0, 6)], [(0, 3)]], 3)),
    "blind rows": lambda: attention.check(layout([[(0, 11), (1, 14)]], padding=(5, 3))),
}
FAULTS: list[tuple[str, str, str, str]] = [
    ("_segment_kernels", "row = tl.where(inside, low + (tile - first) * BM, row)", "row = tl.where(inside, (tile - first) * BM, row)", "gemm"),
    ("_segment_kernels", "weight = tl.where(inside, weights[m], weight)", "weight = weights[m]", "gemm"),
    ("_segment_kernels", "high = tl.where(here, tl.load(offsets + m + 1), high)", "high = tl.where(here, tl.load(offsets + m + 1) - 1, high)", "gemm"),
    ("modality_gemm", "mask=(rows[:, None] < end - row) & (columns[None, :] < N))", "mask=(rows[:, None] <= end - row) & (columns[None, :] < N))", "gemm"),
    ("modality_gemm", "w_step = BK * stride_w", "w_step = BK", "gemm"),
    ("modality_gemm", "bias += tl.sum(g.to(ACC), axis=1)", "bias = tl.sum(g.to(ACC), axis=1)", "gemm"),
    ("modality_gemm", "x_tile += BK * stride_x", "x_tile += BK", "gemm"),
    ("modality_gemm", "acc += tl.load(out + place, mask=mask, other=0.0).to(ACC)", "acc += 0.0", "accumulate"),
    ("modality_gemm", "tl.store(up_out + place, up, mask=mask)", "tl.store(up_out + place, gate, mask=mask)", "gemm swiglu"),
    ("rms_norm", "d += tl.load(grad_summed + i * stride_summed", "d += 0 * tl.load(grad_summed + i * stride_summed", "norm"),
    ("rms_norm", "d = rstd * (d - normed * (tl.sum(d * normed, axis=0) / D))", "d = rstd * (d - normed * (tl.sum(d * normed, axis=0) / BLOCK))", "norm"),
    ("rms_norm", "last = tl.where(here, tile + num_tiles, last)", "last = tl.where(here, tile + num_tiles + 1, last)", "norm"),
    ("qk_norm_rope", "first * cos_first - second * sin_first", "first * sin_first - second * cos_first", "heads"),
    ("qk_norm_rope", "first = d_first * cos_first + d_second * sin_second", "first = d_first * cos_first - d_second * sin_second", "heads"),
    ("swiglu", "(1.0 + g * (1.0 - sigmoid))", "(1.0 + g * sigmoid)", "swiglu"),
    ("swiglu", "mask = column < F\n    d =", "mask = column <= F\n    d =", "swiglu"),
    ("linear_cross_entropy", "1.0 + 2.0 * Z_LOSS * lse", "1.0 + Z_LOSS * lse", "loss"),
    ("linear_cross_entropy", "total = total * tl.exp(largest - safe) + ", "total = total + ", "loss"),
    ("masked_routing_attention", "(columns[None, :] < high[:, None])", "(columns[None, :] <= high[:, None])", "attention"),
    ("masked_routing_attention", "values, acc * shrink[:, None]", "values, acc", "attention"),
    ("masked_routing_attention", "head = kv_head * GROUP + turn % GROUP", "head = kv_head * GROUP", "attention"),
    ("masked_routing_attention", "tl.where(wanted[:, None], dk_acc * SCALE, 0.0)", "tl.where(wanted[:, None], dk_acc, 0.0)", "attention"),
    ("masked_routing_attention", "d_scores = weights * (d_weights - delta[:, None])", "d_scores = weights * d_weights", "attention"),
    ("masked_routing_attention", "last_full = tl.min(tl.where(exists, tl.where(sees, high, 0), _BEYOND), 0) // BLOCK", "last_full = last", "attention"),
    ("masked_routing_attention", "finite_top = tl.where(new_top == float(\"-inf\"), 0.0, new_top)", "finite_top = new_top", "blind rows"),
]
"""(folder or file, what stands in the source, what is put in its place, the test that must fail). None reads or writes further than the guards
around outputs: the tests run in this process."""


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: tuple[str, str, str] | None = None) -> None:
    """Load copies of all kernels from `folder`, one of them with the fault, in the place of the real ones."""
    for name in KERNELS:
        full, path = f"fusiontrain_kernels.{name}", folder / f"{name}.py"
        source = (PACKAGE / f"{name.replace('.', '/')}.py").read_text()
        if fault and name.startswith(fault[0]):
            assert source.count(fault[1]) >= 1, f"{name} has no line {fault[1]!r}"
            source = source.replace(fault[1], fault[2], 1)
        path.write_text(source)
        original = importlib.import_module(full)
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, copy)
        spec.loader.exec_module(copy)
        for module in [module for name, module in sys.modules.items() if name.startswith("fusiontrain_kernels.")]:
            for attribute in [attribute for attribute, value in vars(module).items() if value is original]:
                monkeypatch.setattr(module, attribute, copy)
    copied = sys.modules["fusiontrain_kernels.linear_cross_entropy.triton_kernels"]
    monkeypatch.setattr(copied, "BLOCK", 16)
    monkeypatch.setattr(loss.chunked, "ROWS", {"chunked": 8, "triton": 8})


@pytest.mark.parametrize("name", TESTS)
def test_a_copy_without_a_fault_passes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path)
    TESTS[name]()


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_is_found(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    *fault, name = FAULTS[number]
    install(monkeypatch, tmp_path, (fault[0], fault[1], fault[2]))
    with pytest.raises(AssertionError):
        TESTS[name]()
