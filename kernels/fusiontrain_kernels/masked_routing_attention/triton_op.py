"""masked_routing_attention by Triton, as a custom operator: launches, autograd, and what torch.compile needs to know of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fusiontrain_kernels.masked_routing_attention import configs
from fusiontrain_kernels.masked_routing_attention import triton_kernels as kernels

_LOG2_E = 1 / math.log(2)


def masked_routing_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    scale: float,
    grad_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the package. Raises ValueError for what the kernels cannot take."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"masked_routing_attention: impl='triton' takes one floating dtype for q, k and v, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[-1] > max(configs.HEAD_DIMS):
        raise ValueError(f"masked_routing_attention: impl='triton' has no tiles for a head dim of {q.shape[-1]}, at most {max(configs.HEAD_DIMS)}")
    return _forward_op(q, k, v, key_ranges, query_ranges, grad_rows, scale)[0]


@torch.library.custom_op("fusiontrain::masked_routing_attention", mutates_args=())
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    grad_rows: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _empty_forward(q)
    forward(q, k, v, key_ranges, scale, out, lse)
    return out, lse


def _empty_forward(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(num_heads, num_rows, dtype=_accumulator(q))


@_forward_op.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_forward(q)


@torch.library.custom_op("fusiontrain::masked_routing_attention_backward", mutates_args=())
def _backward_op(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    grad_rows: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = _empty_backward(q, k, v)
    backward(d_out, q, k, v, key_ranges, query_ranges, grad_rows, out, lse, scale, dq, dk, dv)
    return dq, dk, dv


def _empty_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    return dq, dk, dv


@_backward_op.register_fake
def _(d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_backward(q, k, v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, scale = inputs
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    del d_lse
    return *_backward_op(d_out, *ctx.saved_tensors, ctx.scale), None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_ranges: torch.Tensor, scale: float, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Writes out [T, H, Dh] and lse [H, T], both contiguous. lse is in base 2, of the scaled scores."""
    num_rows, num_heads, _ = q.shape
    if num_rows == 0:
        return
    q, k, v = map(_unit_stride, (q, k, v))
    config = _select("forward", q)
    kernels.forward_kernel[(triton.cdiv(num_rows, config.BM), num_heads)](
        q, k, v, key_ranges.contiguous(), out, lse, num_rows, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        H=num_heads, GROUP=num_heads // k.shape[1], G=key_ranges.shape[1], SCALE2=scale * _LOG2_E, **_sizes(q, config)
    )  # fmt: skip


def backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    grad_rows: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Writes dq, dk and dv, all contiguous."""
    num_rows, num_heads, _ = q.shape
    if num_rows == 0:
        return
    d_out, q, k, v = map(_unit_stride, (d_out, q, k, v))
    delta = lse.new_empty(lse.shape)
    config = _select("delta", q)
    sizes = _sizes(q, config)
    del sizes["BN"]
    kernels.delta_kernel[(triton.cdiv(num_rows, config.BM), num_heads)](out, d_out, delta, num_rows, *d_out.stride()[:2], H=num_heads, **sizes)

    grads = key_ranges if grad_rows is None else grad_rows.contiguous()
    strides = (num_rows, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2])
    constants = {
        "H": num_heads,
        "GROUP": num_heads // k.shape[1],
        "G": key_ranges.shape[1],
        "NUM_GRAD": 0 if grad_rows is None else len(grad_rows),
        "SCALE": scale,
        "SCALE2": scale * _LOG2_E,
    }
    config = _select("dkdv", q)
    kernels.dkdv_kernel[(triton.cdiv(num_rows, config.BN), k.shape[1])](
        q, k, v, query_ranges.contiguous(), grads, d_out, lse, delta, dk, dv, *strides, **constants, **_sizes(q, config)
    )
    config = _select("dq", q)
    kernels.dq_kernel[(triton.cdiv(num_rows, config.BM), num_heads)](
        q, k, v, key_ranges.contiguous(), grads, d_out, lse, delta, dq, *strides, **constants, **_sizes(q, config)
    )


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _accumulator(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _select(kernel: str, q: torch.Tensor) -> configs.Config:
    return configs.select(kernel, triton.next_power_of_2(q.shape[-1]), q.dtype, q.device)


def _sizes(q: torch.Tensor, config: configs.Config) -> dict[str, Any]:
    head_dim = q.shape[-1]
    accumulator = tl.float64 if q.dtype == torch.float64 else tl.float32
    return {"D": head_dim, "DP": max(16, triton.next_power_of_2(head_dim)), "ACC": accumulator, **config._asdict()}
