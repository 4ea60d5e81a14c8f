"""masked_routing_attention by torch's scaled_dot_product_attention with a dense mask: what one would write without an operator for it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fusiontrain_kernels.masked_routing_attention.reference import dense_mask


def masked_routing_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor, query_ranges: torch.Tensor, scale: float
) -> torch.Tensor:
    """See the package. The mask has [T, T] bytes and is made in every call."""
    del query_ranges
    mask = dense_mask(key_ranges)
    blind = ~mask.any(dim=1)
    # A blind query is shown every key and its result dropped: torch's kernels disagree on what a softmax over nothing is.
    queries, keys, values = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask | blind[:, None], scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).masked_fill(blind[:, None, None], 0)
