"""An attention written as two functions, forward and backward, made one operator that autograd and torch.compile know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusiontrain_kernels._launch import on_device

Tensor = torch.Tensor


def register(name: str, forward: Callable[..., None], backward: Callable[..., None]) -> Any:
    """The operator `fusiontrain::<name>`: (q, k, v, key_ranges, query_ranges, grad_rows, scale) -> out [T, H, Dh], lse [H, T].

    forward(<these>, out, lse) writes the latter two. backward(d_out, d_lse, <the tensors>, out, lse, scale, dq, dkdv) writes dq and (dk, dv),
    either None where it is not needed; d_lse is None where nothing came back through lse. Results are contiguous, lse float32 at least.
    """

    @torch.library.custom_op(f"fusiontrain::{name}", mutates_args=())
    def run(
        q: Tensor, k: Tensor, v: Tensor, key_ranges: Tensor, query_ranges: Tensor, grad_rows: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _empty_forward(q)
        with on_device(q):
            forward(q, k, v, key_ranges, query_ranges, grad_rows, scale, out, lse)
        return out, lse

    @torch.library.custom_op(f"fusiontrain::{name}_backward", mutates_args=())
    def run_backward(
        d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, key_ranges: Tensor, query_ranges: Tensor, grad_rows: Tensor | None,
        out: Tensor, lse: Tensor, scale: float, need_q: bool, need_kv: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = _empty_backward(q, k, v, need_q, need_kv)
        with on_device(q):
            found = dq if need_q else None, (dk, dv) if need_kv else None
            backward(d_out, d_lse, q, k, v, key_ranges, query_ranges, grad_rows, out, lse, scale, *found)
        return dq, dk, dv

    def differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        need_kv = need_k or need_v
        if (d_out is None and d_lse is None) or not (need_q or need_kv):
            return (None,) * 7
        saved = ctx.saved_tensors  # once: activation checkpointing refuses to be asked again
        out = saved[-2]
        dq, dk, dv = run_backward(torch.zeros_like(out) if d_out is None else d_out, d_lse, *saved, ctx.scale, need_q, need_kv)
        return dq if need_q else None, dk if need_k else None, dv if need_v else None, None, None, None, None

    run.register_fake(lambda q, *_: _empty_forward(q))
    run_backward.register_fake(lambda d_out, d_lse, q, k, v, *rest: _empty_backward(q, k, v, *rest[-2:]))
    run.register_autograd(differentiate, setup_context=_save)
    return run


def _empty_forward(q: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(num_heads, num_rows, dtype=torch.promote_types(q.dtype, torch.float32))


def _empty_backward(q: Tensor, k: Tensor, v: Tensor, need_q: bool, need_kv: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Without elements where nobody asks: an operator has to return as many tensors every time."""
    dq, dk, dv = (tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in ((q, need_q), (k, need_kv), (v, need_kv)))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.scale = scale
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)
