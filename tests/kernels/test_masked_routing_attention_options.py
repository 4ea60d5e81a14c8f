"""What every implementation of attention has beside its output: rows that are constants, the log-sum-exp, holes in intervals, errors."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from fusiontrain_kernels.masked_routing_attention import attend_chunk, chunked_plan, masked_routing_attention
from tests.kernels.attention_layouts import LAYOUTS, Layout, attend, inputs, layout, ranges_of

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
IMPLS = ["reference", "chunked", "sdpa", pytest.param("triton", marks=needs_triton)]
SCALE = 0.4


def run(impl: str, batch: Layout, leaves: list[torch.Tensor], **options: Any) -> Any:
    return masked_routing_attention(*leaves, batch.key_ranges, batch.query_ranges, scale=SCALE, impl=impl, **options)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    actual, expected = actual.detach(), expected.detach()
    largest = float(expected.where(expected.isfinite(), 0).abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * max(1, largest))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("intervals", [[[40, 64]], [[3, 20], [10, 25], [50, 51]], [[9, 9]], []], ids=str)
def test_rows_outside_grad_rows_are_constants(impl: str, intervals: list[list[int]]) -> None:
    """The gradients are those of autograd with the other rows of q, k and v cut off: what is left is as it was."""
    batch = LAYOUTS["three"]
    *leaves, grad = inputs(len(batch), 2, 1, 8)
    live = torch.tensor([any(low <= row < high for low, high in intervals) for row in range(len(batch))])[:, None, None]
    expected, _ = attend(*(torch.where(live, leaf, leaf.detach()) for leaf in leaves), batch.allowed, SCALE)
    out = run(impl, batch, leaves, grad_rows=torch.tensor(intervals, dtype=torch.int32).reshape(-1, 2))
    assert_close(out, expected)
    for actual, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        assert_close(actual, wanted)
        assert not actual[~live.flatten()].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("live", [[True, False, False], [False, True, False], [False, False, True]], ids=["q", "k", "v"])
def test_only_one_of_them_requires_a_gradient(impl: str, live: list[bool]) -> None:
    batch = LAYOUTS["below a tile"]
    *leaves, grad = inputs(len(batch), 2, 1, 8)
    leaves = [leaf.detach().requires_grad_(needed) for leaf, needed in zip(leaves, live, strict=True)]
    (leaf,) = (leaf for leaf in leaves if leaf.requires_grad)
    expected, _ = attend(*leaves, batch.allowed, SCALE)
    assert_close(torch.autograd.grad(run(impl, batch, leaves), leaf, grad)[0], torch.autograd.grad(expected, leaf, grad)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["ragged", "blind padding", "blind rows only"])
def test_lse_and_its_gradient(impl: str, name: str) -> None:
    """Together with the output's, and alone."""
    batch = LAYOUTS[name]
    *leaves, grad = inputs(len(batch), 2, 1, 8)
    out, lse = run(impl, batch, leaves, return_lse=True)
    expected, expected_lse = attend(*leaves, batch.allowed, SCALE)
    assert lse.shape == (2, len(batch)) and lse.dtype == torch.float64
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    grad_lse = grad[..., 0].T.where(batch.allowed.any(1), torch.nan)  # what comes back from a softmax over nothing
    for outs, wanted_outs, cotangents in (((out, lse), (expected, expected_lse), (grad, grad_lse)), ((lse,), (expected_lse,), (grad_lse,))):
        actual = torch.autograd.grad(outs, leaves[:2], cotangents, retain_graph=True)
        wanted = torch.autograd.grad(wanted_outs, leaves[:2], [tensor.nan_to_num() for tensor in cotangents], retain_graph=True)
        for a, b in zip(actual, wanted, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lse_is_float32(impl: str, dtype: torch.dtype) -> None:
    batch = LAYOUTS["below a tile"]
    leaves = [leaf.detach() for leaf in inputs(len(batch), 2, 1, 8, dtype)[:3]]
    out, lse = run(impl, batch, leaves, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(lse.double(), attend(*leaves, batch.allowed, SCALE)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_results_over_two_sets_of_keys_merge(impl: str) -> None:
    """Each half of the keys by itself, weighted by its lse: the whole, and the whole's gradients."""
    batch = LAYOUTS["adjacent images"]
    *leaves, grad = inputs(len(batch), 2, 1, 8)
    halves = []
    for part in (torch.arange(len(batch)) < 19, torch.arange(len(batch)) >= 19):
        allowed = batch.allowed & part
        halves.append(run(impl, Layout(allowed, ranges_of(allowed), ranges_of(allowed.T)), leaves, return_lse=True))
    weights = torch.stack([lse for _, lse in halves]).softmax(0)
    merged = sum(weight.T[..., None] * out for weight, (out, _) in zip(weights, halves, strict=True))
    expected, _ = attend(*leaves, batch.allowed, SCALE)
    for a, b in zip((merged, *torch.autograd.grad(merged, leaves, grad)), (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_hidden_from_the_middle_of_an_interval(impl: str) -> None:
    """Later text sees all of its document but the first image: one more interval; another number of them for the keys than for the queries."""
    batch = layout([[(0, 9), (1, 15), (1, 8), (0, 30)], [(0, 4)]])
    allowed = batch.allowed.clone()
    first_image, text = slice(43, 58), slice(0, 39)
    assert allowed[first_image, first_image].all() and allowed[38, first_image].all()
    allowed[text, first_image] = False
    allowed[text, 3:6] &= torch.arange(39)[:, None] < 12
    hidden = Layout(allowed, ranges_of(allowed), ranges_of(allowed.T))
    assert hidden.key_ranges.shape[1] != hidden.query_ranges.shape[1]
    *leaves, grad = inputs(len(batch), 2, 1, 8)
    out = run(impl, hidden, leaves)
    expected, _ = attend(*leaves, allowed, SCALE)
    for a, b in zip((out, *torch.autograd.grad(out, leaves, grad)), (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
        assert_close(a, b)


@needs_triton
def test_triton_does_no_work_for_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in the backward: none if nothing is wanted, a few for the last rows, all of them for all."""
    from triton.runtime.interpreter import InterpreterBuilder

    batch = layout([[(0, 96)]], 1)
    *leaves, grad = inputs(len(batch), 1, 1, 16)
    count: list[None] = []
    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *arguments: count.append(None) or dot(*arguments))

    def products(live: list[bool], rows: list[int]) -> int:
        tensors = [leaf.detach().requires_grad_(needed) for leaf, needed in zip(leaves, live, strict=True)]
        out = run("triton", batch, tensors, grad_rows=torch.tensor([rows], dtype=torch.int32))
        count.clear()
        out.backward(grad)
        return len(count)

    everything, last, nothing = (products([True] * 3, rows) for rows in ([0, 96], [80, 96], [0, 0]))
    assert nothing == 0
    assert 0 < 2 * last < everything
    of_queries, of_values = products([True, False, False], [0, 96]), products([False, False, True], [0, 96])
    assert min(of_queries, of_values) > 0
    assert of_queries + of_values == everything


def test_a_query_without_keys_among_others_that_do_not_see_themselves() -> None:
    """They share a chunk, so the chunk has a mask with an empty row."""
    ranges = torch.tensor([[[4, 8]]] * 8, dtype=torch.int32)
    ranges[2] = 0
    leaves = [torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_() for seed in range(3)]
    found = []
    for impl in ("reference", "chunked"):
        out, lse = masked_routing_attention(*leaves, ranges, ranges, return_lse=True, impl=impl)
        seen = torch.where(lse.isfinite(), lse, 0).sum() + out.square().sum()
        found.append((out, lse, *torch.autograd.grad(seen, leaves)))
    for wanted, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    assert (found[1][1][:, 2] == -torch.inf).all()


def test_masks_are_kept_as_long_as_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks, none of whose queries all see the same."""
    ranges = torch.tensor([[[row // 96 * 96, row + 1]] for row in range(192)], dtype=torch.int32)
    num_scores = sum(chunk.num_scores for chunk in chunked_plan.make_plan(ranges))
    for limit in (num_scores, num_scores - 1):
        monkeypatch.setattr(chunked_plan, "KEPT_SCORES", limit)
        masks = chunked_plan.make_biases(ranges)
        assert masks is None if limit < num_scores else sum(mask.numel() for mask in masks) == num_scores


def test_chunked_does_no_work_for_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four chunks of one document: the backward of the last alone."""
    batch = layout([[(0, 256)]], 1)
    *leaves, grad = inputs(len(batch), 1, 1, 16, torch.float32)

    calls = []
    backward = attend_chunk.backward
    monkeypatch.setattr(attend_chunk, "backward", lambda *arguments: calls.append(None) or backward(*arguments))
    counts = []
    for rows in ([0, 256], [200, 256], [0, 0]):
        out = run("chunked", batch, leaves, grad_rows=torch.tensor([rows], dtype=torch.int32))
        calls.clear()
        torch.autograd.grad(out, leaves, grad)
        counts.append(len(calls))
    assert counts == [4, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(5, 1, 8)}, r"k and v must be \[5, K, 8\], K a divisor of 2.* not \[5, 1, 8\] and \[5, 2, 8\]"),
        ({"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, "K a divisor of 2"),
        ({"k": torch.zeros(5, 0, 8), "v": torch.zeros(5, 0, 8)}, "K a divisor of 2"),
        ({"k": torch.zeros(5, 8), "v": torch.zeros(5, 8)}, "K a divisor of 2"),
        ({"q": torch.zeros(5, 16)}, r"q must be \[T, H, Dh\]"),
        (dict.fromkeys("qkv", torch.zeros(5, 2, 0)), "Dh > 0"),
        ({"v": torch.zeros(5, 2, 8).double()}, "one dtype, not torch.float32, torch.float32 and torch.float64"),
        ({"k": torch.zeros(5, 2, 8, device="meta")}, "k must be on cpu like q, not on meta"),
        ({"grad_rows": torch.zeros(1, 2, dtype=torch.int32, device="meta")}, "grad_rows must be on cpu"),
        ({"key_ranges": torch.zeros(5, 1, 2)}, r"key_ranges must be int32 \[5, G, 2\], not torch.float32"),
        ({"query_ranges": torch.zeros(4, 1, 2, dtype=torch.int32)}, r"query_ranges must be int32 \[5, G, 2\]"),
        ({"grad_rows": torch.zeros(2, dtype=torch.int32)}, r"grad_rows must be int32 \[N, 2\], not torch.int32 \[2\]"),
    ],
    ids=["k", "heads", "no heads", "k rank", "q rank", "no width", "one dtype", "device", "grad_rows device", "dtype", "rows", "grad_rows"],
)
def test_what_does_not_fit_is_said(change: dict[str, torch.Tensor], message: str) -> None:
    q = torch.zeros(5, 2, 8)
    ranges = torch.zeros(5, 1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        masked_routing_attention(**{"q": q, "k": q, "v": q, "key_ranges": ranges, "query_ranges": ranges, **change})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["ragged", "blind padding"])
def test_intervals_are_cut_off_at_the_first_and_the_last_row(impl: str, name: str) -> None:
    """Those that reach an end go beyond it, and two more lie wholly outside."""
    batch = LAYOUTS[name]
    num_rows = len(batch)

    def beyond(ranges: torch.Tensor) -> torch.Tensor:
        low, high = ranges.unbind(-1)
        sees = low < high
        moved = torch.stack([low.where(~sees | (low > 0), -3), high.where(~sees | (high < num_rows), num_rows + 5)], -1)
        outside = ranges.new_tensor([[-40, -30], [num_rows + 2, num_rows + 5]]).expand(num_rows, 2, 2)
        return torch.cat([moved, outside], 1)

    batch = Layout(batch.allowed, beyond(batch.key_ranges), beyond(batch.query_ranges))
    *leaves, grad = inputs(num_rows, 2, 1, 8)
    out, lse = run(impl, batch, leaves, return_lse=True)
    expected, expected_lse = attend(*leaves, batch.allowed, SCALE)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    for actual, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_wanted_rows_give_zeros_through_lse_alone(impl: str) -> None:
    batch = LAYOUTS["below a tile"]
    *leaves, _ = inputs(len(batch), 2, 1, 8)
    _, lse = run(impl, batch, leaves, grad_rows=torch.zeros(0, 2, dtype=torch.int32), return_lse=True)
    assert all(not grad.any() for grad in torch.autograd.grad(lse.sum(), leaves[:2]))
