"""The specification of masked_routing_attention: the whole mask, the whole matrix of scores."""

from __future__ import annotations

import torch


def masked_routing_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor, query_ranges: torch.Tensor, scale: float
) -> torch.Tensor:
    """See the package. Scores and softmax in float32 at least."""
    del query_ranges  # autograd transposes the dense mask by itself
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    mask = dense_mask(key_ranges)
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(wide).view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("qkrd,skd->krqs", queries, k.to(wide)) * scale
    # The lowest number and not -inf: a row that sees nothing must come out as zeros with zero gradients, and -inf would make it NaN.
    weights = scores.masked_fill(~mask, torch.finfo(wide).min).softmax(-1).masked_fill(~mask, 0)
    out = torch.einsum("krqs,skd->qkrd", weights, v.to(wide))
    return out.reshape(num_rows, num_heads, head_dim).to(q.dtype)


def dense_mask(key_ranges: torch.Tensor) -> torch.Tensor:
    """[T, G, 2] -> [T, T] bool, True where the query of the row sees the key of the column."""
    columns = torch.arange(len(key_ranges), device=key_ranges.device)
    return ((columns >= key_ranges[..., :1]) & (columns < key_ranges[..., 1:])).any(dim=1)
