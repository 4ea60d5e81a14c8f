"""Attention whose mask is a few intervals of keys per query."""

from __future__ import annotations

from typing import Literal, overload

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels._launch import auto_triton, require_triton
from fusiontrain_kernels.masked_routing_attention import chunked, dense, flash, flex, reference
from fusiontrain_kernels.masked_routing_attention.arguments import Arguments

_Output = tuple[torch.Tensor, torch.Tensor | None]


@overload
def masked_routing_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor, query_ranges: torch.Tensor, *,
    scale: float | None = None, grad_rows: torch.Tensor | None = None, return_lse: Literal[False] = False, impl: str = "auto",
) -> torch.Tensor: ...  # fmt: skip


@overload
def masked_routing_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor, query_ranges: torch.Tensor, *,
    scale: float | None = None, grad_rows: torch.Tensor | None = None, return_lse: Literal[True], impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def masked_routing_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    *,
    scale: float | None = None,
    grad_rows: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | _Output:
    """Softmax attention of every query over the keys in its intervals.

    q [T, H, Dh]; k and v [T, K, Dh], K divides H and query head h reads key head h // (H / K); scale: of the scores, default Dh^-0.5.
    key_ranges [T, G, 2] int32: query r sees the rows `key_ranges[r, g, 0] <= row < key_ranges[r, g, 1]` for every g. The G intervals of
    a query must not overlap; nothing else is asked of them, so keys are hidden from the middle of one by giving both its ends (G + 1).
    What of an interval lies outside 0..T is cut off.
    query_ranges [T, G', 2] int32: the transpose, for the backward of implementations that need it.

    grad_rows [N, 2] int32: intervals of rows. q, k and v of all other rows are constants and get zeros for gradients, whose work is not
    done where a whole tile of them lies together: a frozen prefix costs no backward. Without it, every row gets its gradient.
    return_lse: also the log of the sum of the exponentials of a row's scaled scores, natural, [H, T] float32 (float64 for float64), with a
    gradient of its own, so that results over several sets of keys can be merged.

    All numbers must be finite: a NaN or infinity may reach rows of the same tile that must not see it, as 0 * NaN.

    Returns out [T, H, Dh] in q's dtype, or (out, lse). A query that sees nothing gives zeros, an lse of -inf, and no gradient.

    impl: auto (triton on a GPU, else chunked), chunked (plain torch without [T, T] memory), triton (a GPU; elsewhere only under
    TRITON_INTERPRET=1), sdpa (torch's own with the mask made dense, [T, T] memory), flex (torch's flex_attention; no gradient on the CPU), flash
    (flash-attn, where every query sees what comes before it in a contiguous document; no lse), reference (the specification: dense).
    Raises ValueError for an unknown impl, for one that cannot run here or on this, and for tensors that do not fit together.
    """
    attend = choose("masked_routing_attention", _IMPLEMENTATIONS, impl, auto=auto_triton(q, "chunked"))
    given = Arguments(q, k, v, key_ranges, query_ranges, max(q.shape[-1], 1) ** -0.5 if scale is None else scale, grad_rows, return_lse)
    given.check()
    out, lse = attend(given)
    return (out, lse) if return_lse else out


def _triton(given: Arguments) -> _Output:
    require_triton("masked_routing_attention", given.q)
    from fusiontrain_kernels.masked_routing_attention import triton_op

    return triton_op.masked_routing_attention(given)


_IMPLEMENTATIONS = {
    "reference": reference.masked_routing_attention,
    "chunked": chunked.masked_routing_attention,
    "sdpa": dense.masked_routing_attention,
    "triton": _triton,
    "flex": flex.masked_routing_attention,
    "flash": flash.masked_routing_attention,
}
