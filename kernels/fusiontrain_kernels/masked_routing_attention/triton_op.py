"""masked_routing_attention by Triton: launches."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from fusiontrain_kernels._launch import accumulator
from fusiontrain_kernels.masked_routing_attention import configs
from fusiontrain_kernels.masked_routing_attention import triton_kernels as kernels
from fusiontrain_kernels.masked_routing_attention.arguments import Arguments
from fusiontrain_kernels.masked_routing_attention.registration import register

_LOG2_E = 1 / math.log(2)


def masked_routing_attention(given: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package. Raises ValueError for what the kernels cannot take."""
    q, k, v = given.q, given.k, given.v
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"masked_routing_attention: impl='triton' takes one floating dtype for q, k and v, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[-1] > max(configs.HEAD_DIMS):
        raise ValueError(f"masked_routing_attention: impl='triton' has no tiles for a head dim of {q.shape[-1]}, at most {max(configs.HEAD_DIMS)}")
    out, lse = operator(q, k, v, given.key_ranges, given.query_ranges, given.grad_rows, given.scale)
    return out, torch.where(lse == -torch.inf, -torch.inf, lse / _LOG2_E)  # so that no NaN comes back where a row sees nothing


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    grad_rows: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes out [T, H, Dh] and lse [H, T], both contiguous. lse is in base 2, of the scaled scores."""
    num_rows, num_heads, _ = q.shape
    if num_rows == 0:
        return
    q, k, v = map(_unit_stride, (q, k, v))
    config = configs.select("forward", q)
    kernels.forward_kernel[(triton.cdiv(num_rows, config.BM), num_heads)](
        q, k, v, key_ranges.contiguous(), out, lse, num_rows, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        H=num_heads, GROUP=num_heads // k.shape[1], G=key_ranges.shape[1], SCALE2=scale * _LOG2_E, **_sizes(q, config)
    )  # fmt: skip


def backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    grad_rows: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    dq: torch.Tensor | None,
    dkdv: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Writes dq, dk and dv, all contiguous, as far as they are given. lse and its gradient d_lse [H, T] are in base 2."""
    num_rows, num_heads, _ = q.shape
    if num_rows == 0:
        return
    d_out, q, k, v = map(_unit_stride, (d_out, q, k, v))
    delta = _delta(d_out, d_lse, out, lse)
    if grad_rows is not None and len(grad_rows) == 0:  # to the kernels, no list means all rows
        grad_rows = grad_rows.new_zeros(1, 2)
    grads = key_ranges if grad_rows is None else grad_rows.contiguous()
    strides = (num_rows, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2])
    constants = {
        "H": num_heads,
        "GROUP": num_heads // k.shape[1],
        "NUM_GRAD": 0 if grad_rows is None else len(grad_rows),
        "SCALE": scale,
        "SCALE2": scale * _LOG2_E,
    }
    if dkdv is not None:
        config = configs.select("dkdv", q)
        kernels.dkdv_kernel[(triton.cdiv(num_rows, config.BN), k.shape[1])](
            q, k, v, query_ranges.contiguous(), grads, d_out, lse, delta, *dkdv, *strides, **constants, G=query_ranges.shape[1], **_sizes(q, config)
        )
    if dq is not None:
        config = configs.select("dq", q)
        kernels.dq_kernel[(triton.cdiv(num_rows, config.BM), num_heads)](
            q, k, v, key_ranges.contiguous(), grads, d_out, lse, delta, dq, *strides, **constants, G=key_ranges.shape[1], **_sizes(q, config)
        )


def _delta(d_out: torch.Tensor, d_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """[H, T]: what a row's weights take off the gradient of each of its scores; minus the gradient of the natural lse."""
    num_rows, num_heads, _ = out.shape
    delta = lse.new_empty(lse.shape)
    config = configs.select("delta", out)
    sizes = _sizes(out, config)
    del sizes["BN"]
    kernels.delta_kernel[(triton.cdiv(num_rows, config.BM), num_heads)](out, d_out, delta, num_rows, *d_out.stride()[:2], H=num_heads, **sizes)
    return delta if d_lse is None else delta - d_lse * _LOG2_E


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels want neighbours in memory along Dh, and count in 32 bits within a tile, which has at most 128 rows."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(0) <= 2**24 - tensor.shape[-1] else tensor.contiguous()


def _sizes(q: torch.Tensor, config: configs.Config) -> dict[str, Any]:
    head_dim = q.shape[-1]
    return {"D": head_dim, "DP": max(16, triton.next_power_of_2(head_dim)), "ACC": accumulator(q), **config._asdict()}


operator = register("masked_routing_attention", forward, backward)
