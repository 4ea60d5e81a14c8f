"""masked_routing_attention in chunks of neighbouring queries, each over the few keys that any of them sees. Plain PyTorch, any device.

The plan of a call (which chunks, which keys, which masks) depends on `key_ranges` alone and is read by the host, which on a GPU waits for
the device. It is made once per `key_ranges` tensor and kept as long as that lives: the layers of a model share it, and so does a backward
that computes the forward again.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch._compile import _disable_dynamo
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

CHUNK_ROWS = 64
"""Queries per chunk. On one CPU core 64 beats 32 (overhead of calls) and 128 (keys that few of the queries see)."""


@dataclass(frozen=True)
class _Plan:
    """num_rows: queries of each chunk. num_keys: keys of each chunk. keys [sum of num_keys] int64: their rows, chunk after chunk.
    masks: per chunk [queries, keys] bool, or None where every query sees every key."""

    num_rows: list[int]
    num_keys: list[int]
    keys: torch.Tensor
    masks: list[torch.Tensor | None]


_PLANS = WeakTensorKeyDictionary()
"""key_ranges -> ((its version, CHUNK_ROWS), its plan)."""


def masked_routing_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor, query_ranges: torch.Tensor, scale: float
) -> torch.Tensor:
    """See the package. Memory is that of the keys of all chunks, and of one chunk's scores."""
    del query_ranges  # autograd adds up what each key gets from its chunks
    if len(q) == 0:
        return torch.zeros_like(q)
    plan = _plan_of(key_ranges)
    # One gather and one split each: a gather per chunk would make the backward fill a [T, K, Dh] buffer per chunk.
    chunks = zip(q.split(plan.num_rows), k[plan.keys].split(plan.num_keys), v[plan.keys].split(plan.num_keys), plan.masks, strict=True)
    return torch.cat([_attend(*chunk, scale) for chunk in chunks])


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """q [n, H, Dh], k and v [m, K, Dh], mask [n, m] -> [n, H, Dh]."""
    if len(k) == 0:  # zeros that still depend on all three, so that their gradients are zero and not None
        return torch.zeros_like(q) + (q[:0].sum() + k.sum() + v.sum())
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@_disable_dynamo  # reads numbers on the host: not for a graph. Unlike torch.compiler.disable it does not import the compiler (a second)
def _plan_of(key_ranges: torch.Tensor) -> _Plan:
    """The plan made last for this tensor object, unless it was written to since."""
    if key_ranges.is_inference():  # does not count its writes
        return _make_plan(key_ranges)
    stamp = (key_ranges._version, CHUNK_ROWS)
    known = _PLANS.get(key_ranges)
    if known is None or known[0] != stamp:
        known = _PLANS[key_ranges] = (stamp, _make_plan(key_ranges))
    return known[1]


def _make_plan(key_ranges: torch.Tensor) -> _Plan:
    num_rows = _chunk_sizes(key_ranges)
    empty = key_ranges[..., :1] >= key_ranges[..., 1:]
    limits = torch.iinfo(key_ranges.dtype)
    ranges = torch.where(empty, key_ranges.new_tensor([limits.max, limits.min]), key_ranges)  # [T, G, 2]
    chunk_of_row = torch.repeat_interleave(torch.tensor(num_rows, device=ranges.device))[:, None, None].expand_as(ranges)
    extremes = ranges.new_zeros(2, len(num_rows), *ranges.shape[1:])
    extremes[0].scatter_reduce_(0, chunk_of_row, ranges, "amin", include_self=False)
    extremes[1].scatter_reduce_(0, chunk_of_row, ranges, "amax", include_self=False)
    smallest, largest = extremes.tolist()

    num_keys, keys, masks = [], [], []
    for chunk_ranges, low, high in zip(ranges.split(num_rows), smallest, largest, strict=True):
        spans = [torch.arange(low[g][0], high[g][1], device=ranges.device) for g in range(len(low)) if low[g][0] < high[g][1]]
        columns = torch.cat(spans) if spans else ranges.new_empty(0, dtype=torch.int64)
        keys.append(columns)
        num_keys.append(len(columns))
        all_alike = low == high
        masks.append(None if all_alike else ((columns >= chunk_ranges[..., :1]) & (columns < chunk_ranges[..., 1:])).any(dim=1))
    return _Plan(num_rows, num_keys, torch.cat(keys), masks)


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
