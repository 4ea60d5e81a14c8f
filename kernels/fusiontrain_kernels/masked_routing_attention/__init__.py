"""Attention whose mask is a few intervals of keys per query."""

from __future__ import annotations

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels._launch import require_triton
from fusiontrain_kernels.masked_routing_attention import chunked, dense, reference


def _triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor, query_ranges: torch.Tensor, scale: float
) -> torch.Tensor:
    require_triton("masked_routing_attention", q)
    from fusiontrain_kernels.masked_routing_attention import triton_op

    return triton_op.masked_routing_attention(q, k, v, key_ranges, query_ranges, scale)


_IMPLEMENTATIONS = {
    "reference": reference.masked_routing_attention,
    "chunked": chunked.masked_routing_attention,
    "sdpa": dense.masked_routing_attention,
    "triton": _triton,
}


def masked_routing_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention of every query over the keys in its intervals.

    q [T, H, Dh]; k and v [T, K, Dh], K divides H and query head h reads key head h // (H / K); scale: of the scores, default Dh^-0.5.
    key_ranges [T, G, 2] int32: query r sees the rows `key_ranges[r, g, 0] <= row < key_ranges[r, g, 1]` for every g. The G intervals of
    a query must not overlap. query_ranges [T, G, 2] int32: the transpose, for the backward of implementations that need it.
    Returns [T, H, Dh] in q's dtype; zeros for a query that sees nothing.

    impl: auto (= chunked, on every device), chunked (no [T, T] memory), triton (a GPU; elsewhere only under TRITON_INTERPRET=1), sdpa (torch's
    own with the mask made dense, [T, T] memory), reference (the specification: dense, [H, T, T] memory).
    Raises ValueError for an unknown impl and for one that cannot run here.
    """
    attend = choose("masked_routing_attention", _IMPLEMENTATIONS, impl, auto="chunked")
    return attend(q, k, v, key_ranges, query_ranges, q.shape[-1] ** -0.5 if scale is None else scale)
