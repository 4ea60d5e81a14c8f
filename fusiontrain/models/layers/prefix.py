"""The frozen prefix: rows that nothing which trains comes before, so they run forward only and the others attend to them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from fusiontrain.models.layers.attention import Attend
from fusiontrain.models.layers.layout import Layout
from fusiontrain.types import Batch
from fusiontrain_kernels.masked_routing_attention import masked_routing_attention


class Prefix(NamedTuple):
    """rows [F, D], what the layers are told about them, and how they attend to one another."""

    rows: torch.Tensor
    layout: Layout
    attend: Attend


class Borders(NamedTuple):
    """Of the prefix and of the rows behind it: the first row of each modality, as `Batch.modality_bounds` and `Batch.modality_offsets`."""

    prefix_bounds: tuple[int, ...]
    prefix_offsets: torch.Tensor
    bounds: tuple[int, ...]
    offsets: torch.Tensor


def borders(batch: Batch) -> Borders:
    """Where the modalities of a batch lie when its first `num_prefix_rows` rows, all text, are taken apart."""
    count, device_count = batch.num_prefix_rows, batch.slice_offsets[1]
    return Borders(
        tuple(min(bound, count) for bound in batch.modality_bounds),
        torch.minimum(batch.modality_offsets, device_count),
        tuple(max(bound - count, 0) for bound in batch.modality_bounds),
        (batch.modality_offsets - device_count).clamp(min=0),
    )


def attend_inside(batch: Batch, impl: str) -> Attend:
    """How the rows of the prefix attend: they see one another alone, and the first slice is theirs."""
    count = batch.num_prefix_rows
    # A copy with the strides of any other count, which compiled code then takes too.
    ranges = {name: getattr(batch, name)[:count, :1].clone(memory_format=torch.contiguous_format) for name in ("key_ranges", "query_ranges")}
    return partial(masked_routing_attention, **ranges, impl=impl)


def attend_behind(batch: Batch, impl: str) -> Attend:
    """How the other rows attend, to the prefix and to themselves."""
    key_ranges, query_ranges = batch.key_ranges.clone(), batch.query_ranges.clone()
    key_ranges[: batch.num_prefix_rows] = 0
    query_ranges[:, 0] = 0  # the first slice asks for nothing
    live = torch.stack([batch.slice_offsets[1], batch.slice_offsets[-1]])[None]  # [1, 2]
    return partial(_attend_behind, key_ranges=key_ranges, query_ranges=query_ranges, grad_rows=live, impl=impl)


def _attend_behind(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix_k: torch.Tensor, prefix_v: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The operator wants as many queries as keys: those of the prefix are blank and see nothing, which costs no product."""
    count, live = prefix_k.shape[0], q.shape[0]
    blank = q.new_zeros(count, *q.shape[1:])
    out = masked_routing_attention(torch.cat([blank, q]), torch.cat([prefix_k, k]), torch.cat([prefix_v, v]), **options)
    return out.split([count, live])[1]
