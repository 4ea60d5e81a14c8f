"""Attention of a few queries over a few keys, forward and backward without autograd: by torch's kernel on a CPU, by the formula elsewhere.

Heads come first: q [K, n, Dh] holds the queries of all query heads that share one of K key heads one below the other; k and v [K, m, Dh];
bias [n, m], 0 or -inf, or None; lse [K, n]. A query that sees nothing gets zeros and an lse of -inf.
"""

from __future__ import annotations

import torch

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, has_blind: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [K, n, Dh], lse [K, n]. has_blind: whether any query sees nothing."""
    if _has_kernel(q):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], attn_mask=_mask(bias), scale=scale)
        out, lse = out[0], lse[0]
    else:
        scores = _scores(q, k, bias, scale)
        lse = scores.logsumexp(-1)
        out = _weights(scores, lse) @ v
    return out, lse.masked_fill(_blind(bias), -torch.inf) if has_blind and bias is not None else lse


def backward(
    d_out: torch.Tensor, d_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    bias: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, scale: float,
) -> Three:  # fmt: skip
    """-> dq, dk, dv. d_lse [K, n] is that of lse; torch's kernel does not take one."""
    if _has_kernel(q) and d_lse is None:
        lse = lse.masked_fill(lse == -torch.inf, 0)  # what its forward gave
        tensors = (tensor[None] for tensor in (d_out, q, k, v, out, lse))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, False, attn_mask=_mask(bias), scale=scale)
        dq, dk, dv = (grad[0] for grad in grads)
        return dq, dk, dv
    weights = _weights(_scores(q, k, bias, scale), lse)
    delta = (d_out * out).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse.masked_fill(lse == -torch.inf, 0)  # NaN comes back from a softmax over nothing
    d_scores = weights * (d_out @ v.mT - delta[..., None]) * scale
    return d_scores @ k, d_scores.mT @ q, weights.mT @ d_out


def _has_kernel(q: torch.Tensor) -> bool:
    return q.is_cpu


def _scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = q @ k.mT * scale
    return scores if bias is None else scores + bias


def _weights(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()


def _mask(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias[None, None]


def _blind(bias: torch.Tensor) -> torch.Tensor:
    return (bias == -torch.inf).all(-1)
