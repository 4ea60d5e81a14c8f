"""Attention against loops over single queries and keys, and its fast path against its specification."""

from __future__ import annotations

import gc
import math
import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontrain_kernels.masked_routing_attention import attend_chunk, chunked, chunked_plan, masked_routing_attention
from fusiontrain_kernels.masked_routing_attention.kept import Kept

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}


class Layout(NamedTuple):
    """allowed [T, T] bool is the truth; the ranges are read off it."""

    allowed: torch.Tensor
    key_ranges: torch.Tensor
    query_ranges: torch.Tensor


def random_layout(seed: int, num_slices: int = 2, max_image: int = 12) -> Layout:
    """Documents of text and images, each token put in one slice (text in slice 0, an image in any other), padding behind the text."""
    draw = random.Random(seed)
    tokens: list[tuple[int, int, int, int]] = []  # slice, document, order, segment
    for doc in range(draw.randint(1, 5)):
        order = 0
        for _ in range(draw.randint(1, 4)):
            is_image = num_slices > 1 and draw.random() < 0.5
            length = draw.randint(1, max_image)
            place = draw.randint(1, num_slices - 1) if is_image else 0
            segment = len(tokens) if is_image else -1
            tokens += [(place, doc, order + i, segment) for i in range(length)]
            order += length
    tokens += [(0, -1, i, -1) for i in range(draw.randint(0, 3))]
    tokens.sort(key=lambda token: (token[0], token[1] == -1, token[1], token[2]))
    slices, docs, orders, segments = (torch.tensor(column) for column in zip(*tokens, strict=True))
    allowed = (docs[:, None] == docs) & ((orders <= orders[:, None]) | ((segments[:, None] == segments) & (segments >= 0)))
    allowed = torch.where((docs == -1)[:, None], torch.eye(len(docs), dtype=torch.bool), allowed)
    bounds = [int((slices < g).sum()) for g in range(num_slices + 1)]
    return Layout(allowed, ranges_of(allowed, bounds, draw), ranges_of(allowed.T, bounds, draw))


def ranges_of(allowed: torch.Tensor, bounds: list[int], draw: random.Random) -> torch.Tensor:
    ranges = torch.zeros(len(allowed), len(bounds) - 1, 2, dtype=torch.int32)
    for row, sees in enumerate(allowed.tolist()):
        for g in range(len(bounds) - 1):
            seen = [column for column in range(bounds[g], bounds[g + 1]) if sees[column]]
            empty_at = draw.randint(bounds[g], bounds[g + 1])
            low, high = (seen[0], seen[-1] + 1) if seen else (empty_at, empty_at)
            assert len(seen) == high - low, "a query must see one interval per slice"
            ranges[row, g] = torch.tensor([low, high])
    return ranges


def inputs(num_rows: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64, dim: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    return [torch.randn(num_rows, h, dim, generator=generator, dtype=torch.float64).to(dtype) for h in (heads, kv_heads, kv_heads)]


def by_loops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * q . k) v, one query and head at a time."""
    out = torch.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for row in range(len(q)):
        for head in range(q.shape[1]):
            keys = [column for column in range(len(q)) if allowed[row, column]]
            scores = [math.exp(scale * float(q[row, head] @ k[column, head // share])) for column in keys]
            for column, score in zip(keys, scores, strict=True):
                out[row, head] += score / sum(scores) * v[column, head // share]
    return out


@pytest.fixture(params=[5, 64])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(chunked_plan, "CHUNK_ROWS", request.param)
    return request.param


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_equals_loops(impl: str, heads: int, kv_heads: int, chunk_rows: int) -> None:
    for seed in range(3):
        layout = random_layout(seed)
        q, k, v = inputs(len(layout.allowed), heads, kv_heads)
        out = masked_routing_attention(q, k, v, layout.key_ranges, layout.query_ranges, impl=impl)
        torch.testing.assert_close(out, by_loops(q, k, v, layout.allowed, 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "chunked", "sdpa"])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_of_a_head_need_not_lie_next_to_each_other(impl: str, kv_heads: int, dtype: torch.dtype) -> None:
    """Each of q, k, v and the gradient in turn as a view whose last stride is not 1, or 0."""
    layout = random_layout(4)
    tensors = [*inputs(len(layout.allowed), 2, kv_heads, dtype), inputs(len(layout.allowed), 2, kv_heads, dtype)[0]]
    apart = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]

    def results(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        out = masked_routing_attention(*leaves, layout.key_ranges, layout.query_ranges, impl=impl)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    plain = results(*tensors)
    for place in range(4):
        given = [*tensors[:place], apart[place], *tensors[place + 1 :]]
        assert given[place].stride(-1) != 1 or given[place].shape[1] == 1
        for found, expected in zip(results(*given), plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_scale_is_used(impl: str) -> None:
    layout = random_layout(1)
    q, k, v = inputs(len(layout.allowed), 2, 1)
    out = masked_routing_attention(q, k, v, layout.key_ranges, layout.query_ranges, scale=1.7, impl=impl)
    torch.testing.assert_close(out, by_loops(q, k, v, layout.allowed, 1.7), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num_slices=st.integers(1, 4), rows=st.sampled_from([1, 4, 7, 64]), keeps_masks=st.booleans())
def test_chunked_equals_reference_forward_and_backward(seed: int, num_slices: int, rows: int, keeps_masks: bool) -> None:
    layout = random_layout(seed, num_slices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_plan, "CHUNK_ROWS", rows)
        patch.setattr(chunked_plan, "KEPT_SCORES", 10**6 if keeps_masks else 0)
        results = []
        for impl in ("reference", "chunked"):
            leaves = [tensor.requires_grad_() for tensor in inputs(len(layout.allowed), 4, 2)]
            out = masked_routing_attention(*leaves, layout.key_ranges, layout.query_ranges, impl=impl)
            results.append((out, *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_chunks_by_the_formula_as_where_torch_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with rows that see nothing."""
    layout = random_layout(4, 3)
    layout.key_ranges[2:5] = 0
    results = []
    for has_kernel in (True, False):
        monkeypatch.setattr(attend_chunk, "_has_kernel", lambda q, has_kernel=has_kernel: has_kernel)
        leaves = [tensor.requires_grad_() for tensor in inputs(len(layout.allowed), 4, 2)]
        out, lse = masked_routing_attention(*leaves, layout.key_ranges, layout.query_ranges, return_lse=True, impl="chunked")
        results.append((out, lse, *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_precision_and_dtype(impl: str, dtype: torch.dtype) -> None:
    layout = random_layout(7, max_image=30)
    q, k, v = inputs(len(layout.allowed), 4, 2, dtype, dim=16)
    out = masked_routing_attention(q, k, v, layout.key_ranges, layout.query_ranges, impl=impl)
    assert out.dtype == dtype
    exact = by_loops(q.double(), k.double(), v.double(), layout.allowed, 0.25)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradcheck(impl: str, chunk_rows: int) -> None:
    layout = random_layout(3, num_slices=3, max_image=4)
    leaves = [tensor.requires_grad_() for tensor in inputs(len(layout.allowed), 2, 1, dim=2)]
    assert torch.autograd.gradcheck(lambda *qkv: masked_routing_attention(*qkv, layout.key_ranges, layout.query_ranges, impl=impl), leaves)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("blind", [slice(2, 3), slice(0, 5), slice(0, 9)], ids=["one", "a chunk", "all"])
def test_a_query_without_keys_gives_zeros_and_no_gradient(impl: str, blind: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_plan, "CHUNK_ROWS", 5)
    key_ranges = torch.tensor([[[0, 9]]] * 9, dtype=torch.int32)
    key_ranges[blind] = 4
    leaves = [tensor.requires_grad_() for tensor in inputs(9, 2, 1, torch.float32)]
    out = masked_routing_attention(*leaves, key_ranges, key_ranges, impl=impl)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert (out[blind] == 0).all()
    assert (grads[0][blind] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_no_rows(impl: str) -> None:
    out = masked_routing_attention(*inputs(0, 2, 1), *[torch.zeros(0, 2, 2, dtype=torch.int32)] * 2, impl=impl)
    assert out.shape == (0, 2, 4)


@pytest.mark.parametrize("num_image", [0, 1, 37])
def test_text_rows_keep_their_bits_whatever_the_other_slices_hold(num_image: int) -> None:
    """150 rows of text that no image precedes: their result must not depend on how many image rows lie behind them, nor on G."""
    num_text = 150
    q, k, v = inputs(num_text + 37, 4, 2, torch.float32, dim=16)
    text_ranges = torch.tensor([[[row // 30 * 30, row + 1]] for row in range(num_text)], dtype=torch.int32)
    alone = masked_routing_attention(q[:num_text], k[:num_text], v[:num_text], text_ranges, text_ranges)

    rows = num_text + num_image
    ranges = torch.full((rows, 2, 2), num_text, dtype=torch.int32)
    ranges[:num_text, 0] = text_ranges[:, 0]
    ranges[num_text:, 0] = torch.tensor([120, num_text], dtype=torch.int32)
    ranges[num_text:, 1, 1] = rows
    together = masked_routing_attention(q[:rows], k[:rows], v[:rows], ranges, ranges)
    assert torch.equal(together[:num_text], alone)


def test_no_mask_where_every_query_sees_every_key() -> None:
    """An image of whole chunks behind its text: the fast path that images get."""
    ranges = torch.tensor([[[0, row + 1], [6, 6]] for row in range(6)] + [[[0, 6], [6, 134]]] * 128, dtype=torch.int32)
    plan = chunked_plan.make_plan(ranges)
    assert [chunk.rows for chunk in plan] == [(0, 6), (6, 70), (70, 134)]
    assert [chunk.keys for chunk in plan] == [[(0, 6)], [(0, 134)], [(0, 134)]]
    assert [chunk.all_seen for chunk in plan] == [False, True, True]


def test_work_grows_with_what_is_seen_not_with_the_square() -> None:
    """64 documents of 32 tokens: a chunk of two documents takes 64 keys, not 2048."""
    ranges = torch.tensor([[[row // 32 * 32, row + 1]] for row in range(2048)], dtype=torch.int32)
    assert [chunk.keys for chunk in chunked_plan.make_plan(ranges)] == [[(64 * i, 64 * (i + 1))] for i in range(32)]


def test_one_plan_per_key_ranges_until_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, other = random_layout(5), random_layout(5)
    qkv = inputs(len(layout.allowed), 2, 1, torch.float32)
    made = []
    monkeypatch.setattr(chunked, "plan_of", Kept(lambda ranges: made.append(1) or chunked_plan.make_plan(ranges)))

    def attend(ranges: torch.Tensor) -> torch.Tensor:
        return masked_routing_attention(*qkv, ranges, layout.query_ranges, impl="chunked")

    first = attend(layout.key_ranges)
    assert torch.equal(attend(layout.key_ranges), first)
    assert len(made) == 1
    assert torch.equal(attend(other.key_ranges), first)
    assert len(made) == 2

    layout.key_ranges[1:] = 0  # written in place: the kept plan is stale
    assert (attend(layout.key_ranges)[1:] == 0).all()
    assert len(made) == 3


def test_a_plan_is_not_kept_of_a_tensor_that_does_not_count_its_writes() -> None:
    layout = random_layout(5)
    qkv = inputs(len(layout.allowed), 2, 1)
    with torch.inference_mode():
        ranges = layout.key_ranges.clone()
        first = masked_routing_attention(*qkv, ranges, layout.query_ranges, impl="chunked")
        torch.testing.assert_close(first, by_loops(*qkv, layout.allowed, 0.5), rtol=0, atol=1e-12)
        ranges[1:] = 0
        assert (masked_routing_attention(*qkv, ranges, layout.query_ranges, impl="chunked")[1:] == 0).all()


def test_a_plan_lives_no_longer_than_its_key_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "plan_of", Kept(chunked_plan.make_plan))
    layout = random_layout(5)
    masked_routing_attention(*inputs(len(layout.allowed), 2, 1), layout.key_ranges, layout.query_ranges, impl="chunked")
    assert len(chunked.plan_of) == 1
    del layout
    gc.collect()
    assert len(chunked.plan_of) == 0


def test_unknown_impl_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"impl='fast'.*auto, reference, chunked"):
        masked_routing_attention(*inputs(2, 1, 1), *[torch.zeros(2, 1, 2, dtype=torch.int32)] * 2, impl="fast")


def test_auto_is_chunked() -> None:
    layout = random_layout(5)
    arguments = (*inputs(len(layout.allowed), 2, 1, torch.float32), layout.key_ranges, layout.query_ranges)
    expected = masked_routing_attention(*arguments, impl="chunked")
    assert torch.equal(masked_routing_attention(*arguments), expected)


@pytest.mark.parametrize("impl", ["chunked", "sdpa", "triton"])
def test_intervals_of_neighbouring_rows_may_overlap_each_other(impl: str) -> None:
    """Those of one row must not; but what row 0 sees by its second interval, row 1 may see by its first. No key counts twice."""
    rows = 40
    key_ranges = torch.zeros(rows, 2, 2, dtype=torch.int32)
    key_ranges[0::2] = torch.tensor([[0, 10], [20, 30]], dtype=torch.int32)
    key_ranges[1::2] = torch.tensor([[5, 25], [35, 40]], dtype=torch.int32)
    allowed = torch.zeros(rows, rows, dtype=torch.bool)
    allowed[0::2, 0:10] = allowed[0::2, 20:30] = allowed[1::2, 5:25] = allowed[1::2, 35:40] = True
    query_ranges = torch.tensor([[[row, row + 1] if allowed[row, key] else [0, 0] for row in range(rows)] for key in range(rows)], dtype=torch.int32)
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(8)
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)
    out = masked_routing_attention(q, k, v, key_ranges, query_ranges, impl=impl)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for actual, wanted in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
