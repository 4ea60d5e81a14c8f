"""Every per-modality kernel against its reference in float64, over layouts that nobody chose."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fusiontrain.testing.kernels import guarded_outputs
from fusiontrain_kernels.modality_gemm import modality_gemm, modality_swiglu
from fusiontrain_kernels.qk_norm_rope import qk_norm_rope
from fusiontrain_kernels.rms_norm import add_rms_norm

COUNTS = st.lists(st.one_of(st.sampled_from([0, 1, 15, 16, 17]), st.integers(0, 40)), min_size=1, max_size=4)
WIDTHS = st.integers(1, 40)


def check(call: Callable[..., tuple[torch.Tensor, ...]], shapes: list[tuple[int, ...]], live: list[bool]) -> None:
    """call(*leaves, impl=); leaves that are not live need no gradient. NaN is what a kernel finds in memory that is not its own."""
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(alive) for shape, alive in zip(shapes, live, strict=True)]
    wanted = call(*leaves, impl="reference")
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in wanted]
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    with guarded_outputs():
        actual = call(*leaves, impl="triton")
        found = torch.autograd.grad(actual, inputs, grads)
    for a, b in zip([*actual, *found], [*wanted, *torch.autograd.grad(wanted, inputs, grads)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(max_examples=4, derandomize=True)
@given(counts=COUNTS, inner=WIDTHS, width=WIDTHS, data=st.data())
def test_products(counts: list[int], inner: int, width: int, data: st.DataObject) -> None:
    bounds, count = (0, *accumulate(counts)), len(counts)
    live = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))

    def call(x: torch.Tensor, *w: torch.Tensor, impl: str) -> tuple[torch.Tensor, ...]:
        gates, ups, biases = w[:count], w[count : 2 * count], w[2 * count :]
        return modality_gemm(x, gates, bounds, biases, impl=impl), modality_swiglu(x, gates, ups, bounds, impl=impl)

    check(call, [(sum(counts), inner), *[(width, inner)] * (2 * count), *[(width,)] * count], [True, *live, *live, *live])


@settings(max_examples=4, derandomize=True)
@given(counts=COUNTS, dim=WIDTHS, data=st.data())
def test_norms(counts: list[int], dim: int, data: st.DataObject) -> None:
    bounds, count, num_rows = (0, *accumulate(counts)), len(counts), sum(counts)
    live = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    shapes = [(num_rows, dim), (num_rows, dim), *[(dim,)] * count]
    check(lambda x, residual, *w, impl: add_rms_norm(x, residual, w, bounds, 1e-2, impl=impl), shapes, [True, True, *live])


@settings(max_examples=4, derandomize=True)
@given(counts=COUNTS, heads=st.integers(1, 5), kv_heads=st.integers(1, 3), half=st.integers(1, 9), data=st.data())
def test_heads(counts: list[int], heads: int, kv_heads: int, half: int, data: st.DataObject) -> None:
    bounds, count, num_rows = (0, *accumulate(counts)), len(counts), sum(counts)
    live = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    angles = torch.arange(num_rows * half, dtype=torch.float64).view(num_rows, half).repeat(1, 2)

    def call(q: torch.Tensor, k: torch.Tensor, *w: torch.Tensor, impl: str) -> tuple[torch.Tensor, ...]:
        return qk_norm_rope(q, k, w[:count], w[count:], angles.cos(), angles.sin(), bounds, 1e-2, impl=impl)

    check(call, [(num_rows, heads, 2 * half), (num_rows, kv_heads, 2 * half), *[(2 * half,)] * (2 * count)], [True, True, *live, *live])
