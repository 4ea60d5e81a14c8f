"""masked_routing_attention in chunks of neighbouring queries, each over the few keys that any of them sees. PyTorch alone, any device.

The plan of a call (which chunks, which keys, and small masks) depends on `key_ranges` alone and is read by the host, which on a GPU waits for the
device; it is made once per `key_ranges` tensor. All of it happens inside one operator, so torch.compile sees no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fusiontrain_kernels.masked_routing_attention import attend_chunk
from fusiontrain_kernels.masked_routing_attention.arguments import Arguments, wanted_rows
from fusiontrain_kernels.masked_routing_attention.chunked_plan import Chunk, Span, bias_of, biases_of, plan_of
from fusiontrain_kernels.masked_routing_attention.registration import register


def masked_routing_attention(given: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package. Sums are in float32 at least. Memory beside the results: float32 copies of 16-bit tensors, and masks of at most KEPT_SCORES."""
    out, lse = operator(*given[:5], given.grad_rows, given.scale)
    return out, lse


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor, query_ranges: torch.Tensor, grad_rows: torch.Tensor | None,
    scale: float, out: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """Writes out [T, H, Dh] and lse [H, T]."""
    q, k, v = (_wide(tensor) for tensor in (q, k, v))
    num_kv_heads = k.shape[1]
    for chunk, bias in _chunks(key_ranges, q, num_kv_heads):
        rows = slice(*chunk.rows)
        if not chunk.keys:
            out[rows], lse[:, rows] = 0, -torch.inf
            continue
        queries, keys, values = _by_kv_head(q[rows], num_kv_heads), _keys(k, chunk.keys), _keys(v, chunk.keys)
        found, found_lse = attend_chunk.forward(queries, keys, values, bias, scale, chunk.has_blind)
        out[rows] = _by_row(found, q.shape[1])
        lse[:, rows] = found_lse.reshape(q.shape[1], -1)


def backward(
    d_out: torch.Tensor, d_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor,
    query_ranges: torch.Tensor, grad_rows: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, scale: float,
    dq: torch.Tensor | None, dkdv: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:  # fmt: skip
    """Writes dq, dk and dv as far as they are given; chunks of which no gradient is wanted are skipped."""
    d_out, q, k, v, out = (_wide(tensor) for tensor in (d_out, q, k, v, out))
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    results = dq, *(dkdv or (None, None))
    sums = [_zeros_for(result, like) for result, like in zip(results, (q, k, v), strict=True)]
    intervals = None if grad_rows is None else grad_rows.tolist()
    for chunk, bias in _chunks(key_ranges, q, num_kv_heads, intervals):
        if not chunk.keys:
            continue
        rows = slice(*chunk.rows)
        d_lse_rows = None if d_lse is None else d_lse[:, rows].reshape(num_kv_heads, -1)
        grads = attend_chunk.backward(
            _by_kv_head(d_out[rows], num_kv_heads), d_lse_rows, _by_kv_head(q[rows], num_kv_heads), _keys(k, chunk.keys), _keys(v, chunk.keys), bias,
            _by_kv_head(out[rows], num_kv_heads), lse[:, rows].reshape(num_kv_heads, -1), scale,
        )  # fmt: skip
        sums[0][rows] = _by_row(grads[0], num_heads)
        for total, grad in zip(sums[1:], grads[1:], strict=True):
            _add_keys(total, grad, chunk.keys)
    for result, total in zip(results, sums, strict=True):
        if result is None:
            continue
        if grad_rows is not None:
            total.masked_fill_(~wanted_rows(grad_rows, len(q))[:, None, None], 0)
        if result is not total:
            result.copy_(total)


def _zeros_for(result: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Where to sum up what is wanted: in the result itself, unless that is narrower."""
    return torch.zeros_like(like) if result is None or result.dtype != like.dtype else result.zero_()


def _chunks(
    key_ranges: torch.Tensor, q: torch.Tensor, num_kv_heads: int, intervals: list[list[int]] | None = None
) -> Iterator[tuple[Chunk, torch.Tensor | None]]:
    """Those of which a gradient is wanted, and what to add to their scores: [queries of all heads of a key head, keys], or nothing."""
    if len(q) == 0:
        return
    biases, repeats = biases_of(key_ranges), q.shape[1] // num_kv_heads
    for number, chunk in enumerate(plan_of(key_ranges)):
        if chunk.wants_gradient(intervals):
            bias = bias_of(chunk, key_ranges) if biases is None else biases[number]
            bias = None if bias is None else bias.to(q.dtype)
            yield chunk, bias if bias is None or repeats == 1 else bias.repeat(repeats, 1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """float32 at least: on a CPU its kernels are no slower than those for 16 bits, which convert every tile again. torch's kernel takes it for
    granted that the numbers of a head lie next to each other."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def _by_kv_head(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[n, H, Dh] -> [K, H / K * n, Dh]."""
    return x.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_row(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[K, H / K * n, Dh] -> [n, H, Dh]."""
    return x.unflatten(1, (num_heads // len(x), -1)).permute(2, 0, 1, 3).flatten(1, 2)


def _keys(x: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """[T, K, Dh] -> [K, m, Dh], a view where they lie together."""
    parts = [x[low:high] for low, high in spans]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _add_keys(total: torch.Tensor, grad: torch.Tensor, spans: list[Span]) -> None:
    """total [T, K, Dh] += grad [K, m, Dh] at those rows."""
    parts = grad.transpose(0, 1).split([high - low for low, high in spans])
    for (low, high), part in zip(spans, parts, strict=True):
        total[low:high] += part


operator = register("chunked_attention", forward, backward)
