"""masked_routing_attention by torch's scaled_dot_product_attention with a dense mask: what one would write without an operator for it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fusiontrain_kernels.masked_routing_attention.arguments import Arguments
from fusiontrain_kernels.masked_routing_attention.reference import dense_mask, masked_lse, scaled_scores


def masked_routing_attention(given: Arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the package. The mask has [T, T] bytes and is made in every call; lse costs the scores once more, [H, T, T]."""
    q, k, v = given.held()
    mask = dense_mask(given.key_ranges)
    blind = ~mask.any(dim=1)
    # A blind query is shown every key and its result dropped: torch's kernels disagree on what a softmax over nothing is.
    queries, keys, values = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask | blind[:, None], scale=given.scale, enable_gqa=True)
    lse = masked_lse(scaled_scores(q, k, given.scale), mask) if given.return_lse else None
    return out[0].transpose(0, 1).masked_fill(blind[:, None, None], 0), lse
