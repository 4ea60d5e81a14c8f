"""The specification of masked_routing_attention: the whole mask, the whole matrix of scores."""

from __future__ import annotations

import torch

from fusiontrain_kernels.masked_routing_attention.arguments import Arguments


def masked_routing_attention(given: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package. Scores and softmax in float32 at least."""
    q, k, v = given.held()
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    mask = dense_mask(given.key_ranges)
    scores = scaled_scores(q, k, given.scale)
    # The lowest number and not -inf: a row that sees nothing must come out as zeros with zero gradients, and -inf would make it NaN.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0)
    weights = weights.view(num_kv_heads, num_heads // num_kv_heads, num_rows, num_rows)
    out = torch.einsum("krqs,skd->qkrd", weights, v.to(scores.dtype)).reshape(num_rows, num_heads, head_dim)
    return out.to(q.dtype), masked_lse(scores, mask)


def dense_mask(key_ranges: torch.Tensor) -> torch.Tensor:
    """[T, G, 2] -> [T, T] bool, True where the query of the row sees the key of the column."""
    columns = torch.arange(len(key_ranges), device=key_ranges.device)
    return ((columns >= key_ranges[..., :1]) & (columns < key_ranges[..., 1:])).any(dim=1)


def scaled_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """q [n, H, Dh], k [m, K, Dh] -> [H, n, m], float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(wide).unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    return torch.einsum("qkrd,skd->krqs", queries, k.to(wide)).flatten(0, 1) * scale


def masked_lse(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """scores [H, n, m], mask [n, m] -> log of the sum of a row's exponentials [H, n]; -inf, without a gradient, where it sees nothing."""
    lse = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).logsumexp(-1)
    return lse.where(mask.any(-1), -torch.inf)
