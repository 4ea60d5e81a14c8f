"""Attention by other people's kernels: flex_attention uncompiled, and what flash-attn would be told."""

from __future__ import annotations

import gc
import importlib.util
import itertools
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from fusiontrain_kernels.masked_routing_attention import flex, masked_routing_attention
from fusiontrain_kernels.masked_routing_attention.flash import causal_documents
from fusiontrain_kernels.masked_routing_attention.kept import Kept
from tests.kernels.attention_layouts import LAYOUTS, attend, inputs, layout

SCALE = 0.4


@pytest.fixture
def backward_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has the formula, and a check in front of it that refuses the CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


def flex_attention(leaves: list[torch.Tensor], batch: Any, **options: Any) -> Any:
    return masked_routing_attention(*leaves, batch.key_ranges, batch.query_ranges, scale=SCALE, impl="flex", **options)


@pytest.mark.parametrize("name", ["one token", "ragged", "three", "blind padding", "blind rows only"])
def test_flex_equals_the_definition(name: str) -> None:
    batch = LAYOUTS[name]
    leaves = [leaf.detach() for leaf in inputs(len(batch), 4, 2, 8)[:3]]
    actual = flex_attention(leaves, batch, return_lse=True)
    for a, b in zip(actual, attend(*leaves, batch.allowed, SCALE), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_intervals_are_cut_off_at_the_first_and_the_last_row() -> None:
    """By flex, and by what flash-attn is told."""
    batch = LAYOUTS["ragged"]
    low, high = batch.key_ranges.unbind(-1)
    beyond = torch.stack([low.where((low > 0) | (low >= high), -7), high.where((high < len(batch)) | (low >= high), len(batch) + 9)], -1)
    leaves = [leaf.detach() for leaf in inputs(len(batch), 2, 1, 8)[:3]]
    out = masked_routing_attention(*leaves, beyond, batch.query_ranges, scale=SCALE, impl="flex")
    torch.testing.assert_close(out, attend(*leaves, batch.allowed, SCALE)[0], rtol=0, atol=1e-12)
    causal = torch.tensor([[[-5, row + 1], [9, 30]] for row in range(5)], dtype=torch.int32)
    assert causal_documents(causal)[0].tolist() == [0, 5]


@pytest.mark.parametrize("grad_rows", [None, [[10, 30]]], ids=["all", "some"])
def test_flex_backward(grad_rows: list[list[int]] | None, backward_on_the_cpu: None) -> None:
    batch = LAYOUTS["blind padding"]
    *leaves, grad = inputs(len(batch), 2, 1, 8)
    results = []
    for impl in ("flex", "reference"):
        rows = None if grad_rows is None else torch.tensor(grad_rows, dtype=torch.int32)
        out = masked_routing_attention(*leaves, batch.key_ranges, batch.query_ranges, scale=SCALE, grad_rows=rows, impl=impl)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_flex_says_that_it_has_no_backward_here() -> None:
    batch = LAYOUTS["below a tile"]
    with pytest.raises(ValueError, match="impl='flex': FlexAttention does not support backward on CPU"):
        flex_attention(inputs(len(batch), 2, 1, 8)[:3], batch)


def test_flex_needs_an_interval() -> None:
    q, none = torch.zeros(3, 1, 8), torch.zeros(3, 0, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="impl='flex': key_ranges: must have at least one interval"):
        masked_routing_attention(q, q, q, none, none, impl="flex")


def test_a_block_mask_does_not_keep_its_ranges_alive() -> None:
    kept = Kept(flex.make_block_mask)
    ranges = LAYOUTS["ragged"].key_ranges.clone()
    assert kept(ranges) is kept(ranges)
    assert len(kept) == 1
    del ranges
    gc.collect()
    assert len(kept) == 0


@pytest.mark.parametrize(
    ("documents", "padding", "expected"),
    [
        ([[(0, 5)], [(0, 1)], [(0, 7)]], (), [0, 5, 6, 13]),
        ([[(0, 5)]], (3,), [0, 5, 6, 7, 8]),  # each row of padding sees itself
        ([[(0, 4)], [(1, 1)]], (), [0, 4, 5]),  # an image of one token is as good as text
        ([], (), [0]),
    ],
)
def test_documents_for_flash(documents: list[list[tuple[int, int]]], padding: tuple[int, ...], expected: list[int]) -> None:
    """Causal attention in each of them, one after another, is the definition."""
    batch = layout(documents, padding=padding, blind=False)
    bounds, longest = causal_documents(batch.key_ranges)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == expected
    assert longest == max(b - a for a, b in zip(expected, [*expected[1:], expected[-1]], strict=True))
    q, k, v = (leaf.detach() for leaf in inputs(len(batch), 2, 2, 8)[:3])
    outs = [torch.zeros_like(q[:0])]
    for begin, end in itertools.pairwise(expected):
        rows = (tensor[begin:end].transpose(0, 1) for tensor in (q, k, v))
        outs.append(torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, scale=SCALE).transpose(0, 1))
    torch.testing.assert_close(torch.cat(outs), attend(q, k, v, batch.allowed, SCALE)[0], rtol=0, atol=1e-12)


def test_a_document_in_two_neighbouring_slices_is_one() -> None:
    """Frozen text, then the rest of the same document in a slice of its own."""
    ranges = torch.tensor([[[0, row + 1], [4, 4]] for row in range(4)] + [[[0, 4], [4, row + 1]] for row in range(4, 9)], dtype=torch.int32)
    assert causal_documents(ranges)[0].tolist() == [0, 9]


@pytest.mark.parametrize(
    ("documents", "padding", "row"),
    [
        ([[(0, 3)], [(1, 4)]], (), 3),  # an image sees itself
        ([[(0, 3), (1, 1), (0, 2)], [(0, 4)]], (), 3),  # text behind an image, which is stored elsewhere
        ([[(0, 3)]], (2,), 3),  # blind
    ],
    ids=["image", "interleaved", "blind"],
)
def test_no_flash_for_other_masks(documents: list[list[tuple[int, int]]], padding: tuple[int, ...], row: int) -> None:
    with pytest.raises(ValueError, match=f"impl='flash': row {row} does not see exactly what comes before it"):
        causal_documents(layout(documents, padding=padding).key_ranges)


@pytest.mark.parametrize("key_ranges", [[[0, 1], [1, 2], [0, 3]], [[0, 1], [0, 2], [1, 3]], [[0, 1], [0, 1], [0, 3]]])
def test_no_flash_where_a_row_does_not_continue_its_document(key_ranges: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="impl='flash': row"):
        causal_documents(torch.tensor(key_ranges, dtype=torch.int32)[:, None])


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_is_not_installed() -> None:
    q = torch.zeros(3, 1, 8)
    ranges = torch.zeros(3, 1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="impl='flash': the package flash-attn is not installed"):
        masked_routing_attention(q, q, q, ranges, ranges, impl="flash")
