"""masked_routing_attention in chunks of neighbouring queries, each over the few keys that any of them sees. Plain PyTorch, any device.

The plan of a call (which chunks, which keys, which masks) depends on `key_ranges` alone and is read by the host, which on a GPU waits for
the device. It is made once per `key_ranges` tensor. Making it breaks torch.compile's graph: not for fullgraph=True.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from fusiontrain_kernels.masked_routing_attention.arguments import Arguments
from fusiontrain_kernels.masked_routing_attention.kept import Kept
from fusiontrain_kernels.masked_routing_attention.reference import masked_lse, scaled_scores

CHUNK_ROWS = 64
"""Queries per chunk. On one CPU core 64 beats 32 (overhead of calls) and 128 (keys that few of the queries see)."""


@dataclass(frozen=True)
class _Plan:
    """num_rows: queries of each chunk. num_keys: keys of each chunk. keys [sum of num_keys] int64: their rows, chunk after chunk.
    masks: per chunk [queries, keys] bool, or None where every query sees every key. rows: per chunk the intervals of rows that are in it, its
    queries first."""

    num_rows: list[int]
    num_keys: list[int]
    keys: torch.Tensor
    masks: list[torch.Tensor | None]
    rows: list[list[tuple[int, int]]]


def masked_routing_attention(given: Arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the package. Memory is that of the keys of all chunks, and of one chunk's scores; lse computes the scores once more."""
    q, k, v = given.held()
    if len(q) == 0:
        return torch.zeros_like(q), scaled_scores(q, k, given.scale).sum(-1)
    plan = _plan_of(given.key_ranges)
    wanted = _wanted(plan, given.grad_rows)
    # One gather and one split each: a gather per chunk would make the backward fill a [T, K, Dh] buffer per chunk.
    chunks = zip(q.split(plan.num_rows), k[plan.keys].split(plan.num_keys), v[plan.keys].split(plan.num_keys), plan.masks, strict=True)
    outs, lses = [], []
    for chunk, has_gradient in zip(chunks, wanted, strict=True):
        with torch.set_grad_enabled(torch.is_grad_enabled() and has_gradient):
            outs.append(_attend(*chunk, given.scale))
            if given.return_lse:
                lses.append(_lse(chunk[0], chunk[1], chunk[3], given.scale))
    out = torch.cat(outs)
    lse = torch.cat(lses, dim=1) if lses else None
    if not any(wanted):  # zeros for gradients, not an error
        scores = q[:0].sum() + k[:0].sum()
        out = out + (scores + v[:0].sum())
        lse = None if lse is None else lse + scores
    return out, lse


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """q [n, H, Dh], k and v [m, K, Dh], mask [n, m] -> [n, H, Dh]."""
    if len(k) == 0:  # zeros that still depend on all three, so that their gradients are zero and not None
        return torch.zeros_like(q) + (q[:0].sum() + k.sum() + v.sum())
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _lse(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """-> [H, n]."""
    scores = scaled_scores(q, k, scale)
    if len(k) == 0:
        return scores.sum(-1) - torch.inf
    return scores.logsumexp(-1) if mask is None else masked_lse(scores, mask)


@_disable_dynamo
def _wanted(plan: _Plan, grad_rows: torch.Tensor | None) -> list[bool]:
    """Per chunk, whether any gradient is asked for of any of its rows."""
    if grad_rows is None:
        return [True] * len(plan.rows)
    intervals = grad_rows.tolist()
    return [any(first < end and begin < last for first, last in rows for begin, end in intervals) for rows in plan.rows]


def _make_plan(key_ranges: torch.Tensor) -> _Plan:
    key_ranges = key_ranges.clamp(0, len(key_ranges))
    num_rows = _chunk_sizes(key_ranges)
    empty = key_ranges[..., :1] >= key_ranges[..., 1:]
    limits = torch.iinfo(key_ranges.dtype)
    ranges = torch.where(empty, key_ranges.new_tensor([limits.max, limits.min]), key_ranges)  # [T, G, 2]
    chunk_of_row = torch.repeat_interleave(torch.tensor(num_rows, device=ranges.device))[:, None, None].expand_as(ranges)
    extremes = ranges.new_zeros(2, len(num_rows), *ranges.shape[1:])
    extremes[0].scatter_reduce_(0, chunk_of_row, ranges, "amin", include_self=False)
    extremes[1].scatter_reduce_(0, chunk_of_row, ranges, "amax", include_self=False)
    smallest, largest = extremes.tolist()

    num_keys, keys, masks, rows = [], [], [], []
    starts = itertools.accumulate(num_rows, initial=0)
    for start, chunk_ranges, low, high in zip(starts, ranges.split(num_rows), smallest, largest, strict=False):
        spans = _union((low[g][0], high[g][1]) for g in range(len(low)) if low[g][0] < high[g][1])
        rows.append([(start, start + len(chunk_ranges)), *spans])
        columns = torch.cat([torch.arange(*span, device=ranges.device) for span in spans]) if spans else ranges.new_empty(0, dtype=torch.int64)
        keys.append(columns)
        num_keys.append(len(columns))
        all_alike = low == high
        masks.append(None if all_alike else ((columns >= chunk_ranges[..., :1]) & (columns < chunk_ranges[..., 1:])).any(dim=1))
    return _Plan(num_rows, num_keys, torch.cat(keys), masks, rows)


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """As few as hold the same rows, in ascending order: a key must not be gathered twice."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def _chunk_sizes(key_ranges: torch.Tensor) -> list[int]:
    """CHUNK_ROWS each, but no chunk lies in two slices.

    So what other slices hold cannot change the order in which a row's sum is taken, nor its last bit; and images that are multiples of a
    chunk need no masks. The slice of a row is the one in which it sees itself.
    """
    rows = torch.arange(len(key_ranges), device=key_ranges.device)[:, None]
    sees_itself = (key_ranges[..., 0] <= rows) & (rows < key_ranges[..., 1])  # [T, G]
    changes = (sees_itself[1:] != sees_itself[:-1]).any(dim=1).nonzero().squeeze(1) + 1
    borders = [0, *changes.tolist(), len(key_ranges)]
    return [min(CHUNK_ROWS, end - first) for start, end in itertools.pairwise(borders) for first in range(start, end, CHUNK_ROWS)]


_plan_of = Kept(_make_plan)
