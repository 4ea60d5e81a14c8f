"""masked_routing_attention in chunks of neighbouring queries, each over the few keys that any of them sees. Plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch.nn import functional as F

CHUNK_ROWS = 64


def masked_routing_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor, query_ranges: torch.Tensor, scale: float
) -> torch.Tensor:
    """See the package. Memory is [H, chunk, keys of the chunk]."""
    del query_ranges
    outputs = []
    for first in range(0, len(q), CHUNK_ROWS):
        ranges = key_ranges[first : first + CHUNK_ROWS]
        spans = _spans(ranges)
        if not spans:
            outputs.append(torch.zeros_like(q[first : first + CHUNK_ROWS]))
            continue
        rows = torch.cat([torch.arange(low, high, device=q.device) for low, high in spans])
        mask = ((rows >= ranges[..., :1]) & (rows < ranges[..., 1:])).any(dim=1)
        out = F.scaled_dot_product_attention(
            q[first : first + CHUNK_ROWS].transpose(0, 1)[None],
            k[rows].transpose(0, 1)[None],
            v[rows].transpose(0, 1)[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _spans(ranges: torch.Tensor) -> list[tuple[int, int]]:
    """The rows of each slice that any query of the chunk sees; slices of which none sees a row are left out."""
    empty = ranges[..., 0] >= ranges[..., 1]
    lows = ranges[..., 0].masked_fill(empty, torch.iinfo(ranges.dtype).max).amin(0).tolist()
    highs = ranges[..., 1].masked_fill(empty, -1).amax(0).tolist()
    return [(low, high) for low, high in zip(lows, highs, strict=True) if low < high]
