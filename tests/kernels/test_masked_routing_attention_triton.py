"""The Triton kernels of attention, in Triton's interpreter, against the dense definition in float64: forward, backward, and as an operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fusiontrain.testing.kernels import guarded_outputs
from fusiontrain_kernels.masked_routing_attention import masked_routing_attention, triton_op
from tests.kernels.attention_layouts import LAYOUTS, Layout, attend, inputs, layout, random_layout

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the largest number of each output."""


def triton_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Layout, **options: Any) -> Any:
    return masked_routing_attention(q, k, v, batch.key_ranges, batch.query_ranges, impl="triton", **options)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if actual.numel():
        assert float((actual.detach().double() - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def check(batch: Layout, heads: int = 2, kv_heads: int = 1, dim: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
    """Output and gradients are those of the definition, and nothing is written beside them."""
    *leaves, grad = inputs(len(batch), heads, kv_heads, dim, dtype, seed)
    with guarded_outputs():
        out = triton_attention(*leaves, batch)
        grads = torch.autograd.grad(out, leaves, grad)
    assert {tensor.dtype for tensor in (out, *grads)} == {dtype}
    expected, _ = attend(*leaves, batch.allowed, dim**-0.5)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for a, b in zip((out, *grads), (expected, *wanted), strict=True):
        assert_close(a, b.detach(), TOLERANCE[dtype])


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_definition(name: str) -> None:
    check(LAYOUTS[name])


@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), num_slices=st.integers(1, 4), share=st.sampled_from([1, 2]))
def test_equals_the_definition_on_random_layouts(seed: int, num_slices: int, share: int) -> None:
    check(random_layout(seed, num_slices), heads=2, kv_heads=2 // share, seed=seed)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (4, 2), (4, 1), (3, 1)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int) -> None:
    check(LAYOUTS["below a tile"], heads, kv_heads)


@pytest.mark.parametrize("dim", [4, 24, 64, 96, 128, 256])
def test_head_dims(dim: int) -> None:
    check(LAYOUTS["adjacent images"], heads=2, kv_heads=1, dim=dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ragged", "blind padding"])
def test_precision(name: str, dtype: torch.dtype) -> None:
    check(LAYOUTS[name], dtype=dtype)


def test_large_scores_do_not_overflow() -> None:
    """exp of the scores is beyond float32; the largest of a row lies in any tile."""
    batch = LAYOUTS["ragged"]
    q, k, v, _ = inputs(len(batch), 2, 1, 16, torch.float32)
    out = triton_attention(q * 60, k, v, batch, scale=1.0)
    expected = torch.einsum("qhd,khd->hqk", (q * 60).double(), k.double().expand(-1, 2, -1)).masked_fill(~batch.allowed, -torch.inf).softmax(-1)
    assert_close(out, torch.einsum("hqk,khd->qhd", expected, v.double().expand(-1, 2, -1)).detach(), 1e-4)


def test_scale_is_used_both_ways() -> None:
    batch = LAYOUTS["below a tile"]
    *leaves, grad = inputs(len(batch), 2, 1, 16)
    out = triton_attention(*leaves, batch, scale=1.7)
    expected, _ = attend(*leaves, batch.allowed, 1.7)
    for a, b in zip((out, *torch.autograd.grad(out, leaves, grad)), (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
        assert_close(a, b.detach(), 1e-12)


def test_strides_of_inputs_and_of_the_gradient() -> None:
    """q, k and v cut out of one product, heads first, one with neighbours two apart; a gradient that is a transposed view."""
    batch = LAYOUTS["adjacent images"]
    q, k, v, grad = inputs(len(batch), 2, 2, 16)
    fused = torch.cat([q, k], dim=1).detach()
    leaves = [
        fused[:, :2].requires_grad_(),
        fused[:, 2:].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        torch.stack([v, v], -1).detach()[..., 0].requires_grad_(),
    ]
    assert [leaf.is_contiguous() for leaf in leaves] == [False] * 3
    results = []
    for tensors, cotangent in ((leaves, grad.transpose(0, 1).contiguous().transpose(0, 1)), ([q, k, v], grad)):
        out = triton_attention(*tensors, batch)
        results.append((out, *torch.autograd.grad(out, tensors, cotangent)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
        assert actual.is_contiguous()


def test_a_gradient_without_strides() -> None:
    """That of a sum is one number, expanded."""
    batch = LAYOUTS["below a tile"]
    *leaves, grad = inputs(len(batch), 2, 1, 16)
    for actual, expected in zip(
        torch.autograd.grad(triton_attention(*leaves, batch).sum(), leaves),
        torch.autograd.grad(triton_attention(*leaves, batch), leaves, torch.ones_like(grad)),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("axis", ["rows", "heads"])
def test_tensors_beyond_two_to_the_31_elements(axis: str) -> None:
    """The last row, or the last head, of q, k, v and the gradient lies behind 2^31 elements. The memory between is never touched."""
    num_rows, heads = (162, 1) if axis == "rows" else (3, 3)
    row, head = (2**24 - 8, 16) if axis == "rows" else (16, 2**30 + 64)
    batch = layout([[(0, 1)]] * 157 + [[(0, 5)]] if axis == "rows" else [[(0, 3)]], 1)
    small = [tensor.detach() for tensor in inputs(num_rows, heads, heads, 16, torch.float16)]
    storage = torch.empty((num_rows - 1) * row + (heads - 1) * head + 4096, dtype=torch.float16)
    assert storage.numel() > 2**31
    large = [storage.as_strided((num_rows, heads, 16), (row, head, 1), 512 * i).copy_(tensor) for i, tensor in enumerate(small)]
    results = []
    for tensors in (large, small):
        leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
        out = triton_attention(*leaves, batch)
        results.append((out, *torch.autograd.grad(out, leaves, tensors[3])))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_rows_further_apart_than_a_tile_can_count_are_copied() -> None:
    """128 rows of 2^24 elements are what 32 bits can count."""
    storage = torch.empty(2**24 + 64, dtype=torch.float16)
    for distance, fits in ((2**24 - 16, True), (2**24 - 15, False), (2**24 + 32, False)):
        tensor = storage.as_strided((2, 1, 16), (distance, 16, 1))
        assert (triton_op._unit_stride(tensor) is tensor) == fits
        assert triton_op._unit_stride(tensor).stride()[-1] == 1
        assert 127 * triton_op._unit_stride(tensor).stride(0) + 16 < 2**31


def test_the_backward_repeats_its_bits() -> None:
    batch = LAYOUTS["adjacent images"]
    *leaves, grad = inputs(len(batch), 2, 1, 16, torch.float32)
    out = triton_attention(*leaves, batch)
    first, second = (torch.autograd.grad(out, leaves, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("num_image", [0, 37])
def test_text_keeps_its_bits_whatever_the_other_slices_hold(num_image: int) -> None:
    """Forward and backward of text that no image precedes, beside images that other text precedes."""
    text = [[(0, 30)], [(0, 9)], [(0, 22)]]
    alone = layout(text, 1)
    together = layout([*text, [(0, 3), (1, num_image)]], 2)
    results = []
    for batch in (alone, together):
        *leaves, grad = (tensor[: len(batch)] for tensor in inputs(len(together), 2, 1, 16, torch.float32))
        out = triton_attention(*leaves, batch)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b[: len(alone)])


def test_no_rows() -> None:
    batch = layout([], 2)
    *leaves, grad = inputs(0, 2, 1, 16)
    out = triton_attention(*leaves, batch)
    assert [tensor.shape for tensor in (out, *torch.autograd.grad(out, leaves, grad))] == [(0, 2, 16), (0, 2, 16), (0, 1, 16), (0, 1, 16)]


def test_gradcheck() -> None:
    batch = layout([[(0, 2), (1, 2)]], padding=(1,))
    leaves = inputs(len(batch), 2, 1, 2)[:3]
    assert torch.autograd.gradcheck(lambda *qkv: triton_attention(*qkv, batch), leaves, fast_mode=True)


@pytest.mark.parametrize("grad_rows", [None, torch.tensor([[2, 5]], dtype=torch.int32)], ids=["all", "some"])
def test_opcheck(grad_rows: torch.Tensor | None) -> None:
    batch = LAYOUTS["below a tile"]
    leaves = inputs(len(batch), 2, 1, 16, torch.float32)[:3]
    torch.library.opcheck(triton_op.operator, (*leaves, batch.key_ranges, batch.query_ranges, grad_rows, 0.5))


def test_compiles_once_for_all_routings() -> None:
    """Forward and backward in one graph each; another routing of as many rows needs no other."""
    from torch._dynamo.testing import CompileCounterWithBackend

    batches = [layout([[(0, 7), (1, 8)]]), layout([[(0, 15)]]), layout([[(1, 4)], [(0, 5)]], padding=(3, 3))]
    counter = CompileCounterWithBackend("aot_eager")
    options = {"grad_rows": torch.tensor([[6, 15]], dtype=torch.int32), "return_lse": True}
    compiled = torch.compile(triton_attention, backend=counter, fullgraph=True)
    for batch in batches:
        *leaves, grad = inputs(15, 2, 1, 16)
        results = []
        for function in (compiled, triton_attention):
            out, lse = function(*leaves, batch, **options)
            results.append((out, lse, *torch.autograd.grad((out, lse), leaves, (grad, lse.detach().exp()))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("dim", "dtypes", "message"),
    [(512, [torch.float32] * 3, "head dim of 512, at most 256"), (16, [torch.float32, torch.float16, torch.float32], "must have one dtype")],
)
def test_what_the_kernels_cannot_take(dim: int, dtypes: list[torch.dtype], message: str) -> None:
    q, k, v = (torch.zeros(2, 1, dim, dtype=dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match=message):
        triton_attention(q, k, v, layout([[(0, 2)]], 1))
