"""Every operator in every implementation that runs here: one graph without a break, which holds for any routing of as many rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fusiontrain_kernels.linear_cross_entropy import linear_cross_entropy
from fusiontrain_kernels.masked_routing_attention import chunked, masked_routing_attention
from fusiontrain_kernels.modality_gemm import grouped, modality_gemm, modality_swiglu, segments
from fusiontrain_kernels.qk_norm_rope import qk_norm_rope
from fusiontrain_kernels.rms_norm import add_rms_norm, rms_norm
from fusiontrain_kernels.rope import rope
from fusiontrain_kernels.swiglu import swiglu
from tests.kernels.attention_layouts import layout

TRITON = ["triton"] if importlib.util.find_spec("triton") is not None else []
ROWS, WIDTH = 16, 8
ROUTINGS = [(0, 5, 9, 16), (0, 0, 16, 16), (0, 16, 16, 16), (0, 1, 2, 16)]
X, MATRIX, GAIN, HEADS = (ROWS, WIDTH), (12, WIDTH), (WIDTH,), (ROWS, 2, WIDTH)

Bounds, Call = tuple[int, ...], Callable[..., tuple[torch.Tensor, ...]]
CALLS: dict[str, tuple[list[str], list[tuple[int, ...]], Callable[[str], Call]]] = {
    "modality_gemm": (
        ["reference", "segments", "grouped_mm"],
        [X, *[MATRIX] * 3, *[(12,)] * 3],
        lambda impl: lambda bounds, offsets, x, *w: (modality_gemm(x, w[:3], bounds, w[3:], offsets=offsets, impl=impl),),
    ),
    "modality_swiglu": (
        ["reference", "segments", "grouped_mm"],
        [X, *[MATRIX] * 6],
        lambda impl: lambda bounds, offsets, x, *w: (modality_swiglu(x, w[:3], w[3:], bounds, offsets=offsets, impl=impl),),
    ),
    "rms_norm": (
        ["reference", "eager"],
        [X, *[GAIN] * 3],
        lambda impl: lambda bounds, offsets, x, *w: (rms_norm(x, w, bounds, 1e-5, offsets=offsets, impl=impl),),
    ),
    "add_rms_norm": (
        ["reference", "eager"],
        [X, X, *[GAIN] * 3],
        lambda impl: lambda bounds, offsets, x, r, *w: add_rms_norm(x, r, w, bounds, 1e-5, offsets=offsets, impl=impl),
    ),
    "qk_norm_rope": (
        ["reference", "eager"],
        [HEADS, (ROWS, 1, WIDTH), *[GAIN] * 6],
        lambda impl: lambda bounds, offsets, q, k, *w: qk_norm_rope(q, k, w[:3], w[3:], COS, SIN, bounds, 1e-5, offsets=offsets, impl=impl),
    ),
    "rope": (["reference", "eager", *TRITON], [HEADS], lambda impl: lambda bounds, offsets, x: (rope(x, COS, SIN, impl=impl),)),
    "swiglu": (["reference", *TRITON], [X, X], lambda impl: lambda bounds, offsets, gate, up: (swiglu(gate, up, impl=impl),)),
    "linear_cross_entropy": (
        ["reference", "chunked", *TRITON],
        [X, (30, WIDTH)],
        lambda impl: lambda bounds, offsets, h, w: (linear_cross_entropy(h, w, torch.arange(ROWS) - offsets[1], torch.ones(ROWS), z_loss=0.1, impl=impl),),
    ),
}
"""The Triton implementations of operators with borders are compiled in tests of their own."""
ANGLES = torch.outer(torch.arange(ROWS), torch.tensor([1.0, 0.3, 0.1, 0.01])).repeat(1, 2)
COS, SIN = ANGLES.cos(), ANGLES.sin()


def leaves_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def results(outs: tuple[torch.Tensor, ...], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.full_like(out, 0.3) for out in outs])]


@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name, (impls, *_) in CALLS.items() for impl in impls])
def test_segments_of_rows(name: str, impl: str) -> None:
    _, shapes, make = CALLS[name]
    leaves, reference, counter = leaves_of(shapes), make("reference"), CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(make(impl), backend=counter, fullgraph=True)
    for bounds in ROUTINGS:
        offsets = torch.tensor(bounds, dtype=torch.int32)
        pairs = zip(results(compiled(bounds, offsets, *leaves), leaves), results(reference(bounds, offsets, *leaves), leaves), strict=True)
        for actual, wanted in pairs:
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


BATCHES = [layout([[(0, 7), (1, 8)]]), layout([[(0, 15)]]), layout([[(1, 4)], [(0, 5)]], padding=(3, 3)), layout([[(1, 3), (0, 2)]] * 3)]


@pytest.mark.parametrize("impl", ["reference", "chunked", "sdpa"])
def test_attention(impl: str) -> None:
    """With rows that are constants, and the log-sum-exp."""
    leaves, counter = leaves_of([(15, 4, 8), (15, 2, 8), (15, 2, 8)], torch.float64), CompileCounterWithBackend("aot_eager")
    options = {"grad_rows": torch.tensor([[6, 15]], dtype=torch.int32), "return_lse": True, "impl": impl}
    torch.compiler.reset()
    compiled = torch.compile(masked_routing_attention, backend=counter, fullgraph=True)
    for batch in BATCHES:
        cotangents = [torch.ones(15, 4, 8, dtype=torch.float64), torch.ones(4, 15, dtype=torch.float64)]
        found = []
        for attend in (compiled, masked_routing_attention):
            outs = attend(*leaves, batch.key_ranges, batch.query_ranges, **options)
            found.append((*outs, *torch.autograd.grad(outs, leaves, cotangents)))
        for actual, wanted in zip(*found, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    assert counter.frame_count == 1


def test_flex_forward() -> None:
    """Torch gives it no gradient on the CPU. The block mask is made inside the graph."""
    leaves, counter = [leaf.detach() for leaf in leaves_of([(15, 2, 8)] * 3)], CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(masked_routing_attention, backend=counter, fullgraph=True)
    for batch in [*BATCHES, layout([[(1, 150), (0, 150)]])]:
        leaves = leaves if len(batch) == 15 else [leaf.detach() for leaf in leaves_of([(300, 2, 8)] * 3)]
        arguments = (*leaves, batch.key_ranges, batch.query_ranges)
        torch.testing.assert_close(compiled(*arguments, impl="flex"), masked_routing_attention(*arguments, impl="reference"))
    assert counter.frame_count == 2  # one for each number of rows; 300 are more than two blocks


# ---------------------------------------------------------------- the contract of the operators behind them


@pytest.mark.parametrize("grad_rows", [None, torch.tensor([[2, 5]], dtype=torch.int32)], ids=["all", "some"])
def test_opcheck_of_chunked_attention(grad_rows: torch.Tensor | None) -> None:
    batch = BATCHES[2]
    leaves = leaves_of([(15, 4, 8), (15, 2, 8), (15, 2, 8)])
    torch.library.opcheck(chunked.operator, (*leaves, batch.key_ranges, batch.query_ranges, grad_rows, 0.5))


@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_of_segments(biased: bool) -> None:
    x, *weights = leaves_of([X, *[MATRIX] * 3, *[(12,)] * 3])
    torch.library.opcheck(segments.segments_gemm, (x, weights[:3], weights[3:] if biased else [], torch.tensor(ROUTINGS[0], dtype=torch.int32)))


def test_opcheck_of_grouped() -> None:
    x, *weights = leaves_of([X, *[MATRIX] * 3])
    torch.library.opcheck(grouped.grouped_gemm, (x, weights, torch.tensor(ROUTINGS[1], dtype=torch.int32)))


@pytest.mark.parametrize("bounds", ROUTINGS)
def test_gradcheck_of_segments(bounds: Bounds) -> None:
    leaves, offsets = leaves_of([(ROWS, 2), *[(3, 2)] * 3, *[(3,)] * 3], torch.float64), torch.tensor(bounds, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, *w: modality_gemm(x, w[:3], bounds, w[3:], offsets=offsets, impl="segments"), leaves, fast_mode=True)


@pytest.mark.parametrize("live", [[True, False, False, False], [False, True, False, True], [True, True, True, True]], ids=str)
@pytest.mark.parametrize("bounds", ROUTINGS)
def test_gradients_of_grouped_for_what_is_live(live: list[bool], bounds: Bounds) -> None:
    """It has no float64, so no gradcheck: against the reference."""
    leaves = [leaf.detach().requires_grad_(needed) for leaf, needed in zip(leaves_of([X, *[MATRIX] * 3]), live, strict=True)]
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    wanted, actual = (results((modality_gemm(leaves[0], leaves[1:], bounds, impl=impl),), inputs) for impl in ("reference", "grouped_mm"))
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
