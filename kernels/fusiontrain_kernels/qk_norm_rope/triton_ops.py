"""The Triton norm and rotary embedding of one tensor as operators that torch.compile and autograd know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from fusiontrain_kernels._launch import accumulator, on_device, unit_stride
from fusiontrain_kernels.qk_norm_rope import triton_kernels
from fusiontrain_kernels.rms_norm.triton_ops import add_partials

Tensors = Sequence[torch.Tensor]
ROWS = 8  # of one program of the backward
ELEMENTS = 1024  # of each half of the heads that a program has at a time


def tile(num_heads: int, dim: int) -> tuple[int, int, int]:
    """-> heads at a time, elements of half a head, both powers of two, and warps: one for 256 elements."""
    block = triton.next_power_of_2(dim // 2)
    heads = min(triton.next_power_of_2(num_heads), max(ELEMENTS // block, 1))
    return heads, block, max(heads * block // 256, 1)


@torch.library.custom_op("fusiontrain::norm_rope", mutates_args=())
def norm_rope(x: torch.Tensor, weights: Tensors, cos: torch.Tensor, sin: torch.Tensor, offsets: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x [T, H, Dh] with its heads normed, if there are weights (and then offsets), and turned. cos and sin get no gradient."""
    x, cos, sin = unit_stride(x), unit_stride(cos), unit_stride(sin)
    num_rows, num_heads, dim = x.shape
    heads, block, warps = tile(num_heads, dim)
    out = x.new_empty(x.shape)
    with on_device(x):
        triton_kernels.forward[(num_rows, triton.cdiv(num_heads, heads))](
            x, _gains(weights, x), cos, sin, out, x if offsets is None else offsets, num_heads, dim // 2,
            x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
            M=len(weights), NORM=bool(weights), EPS=eps, ACC=accumulator(x), HEADS=heads, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


def _gains(weights: Tensors, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(weight.contiguous() for weight in weights) or (x,)


@norm_rope.register_fake
def _(x: torch.Tensor, weights: Tensors, cos: torch.Tensor, sin: torch.Tensor, offsets: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fusiontrain::norm_rope_backward", mutates_args=())
def norm_rope_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weights: Tensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    eps: float,
    live: Sequence[bool],
) -> list[torch.Tensor]:
    """-> gradient of x, then those of the live modalities' weights. x and offsets matter only where there are weights."""
    grad, cos, sin = unit_stride(grad), unit_stride(cos), unit_stride(sin)
    x = grad if x is None else unit_stride(x)
    num_rows, num_heads, dim = grad.shape
    heads, block, warps = tile(num_heads, dim)
    num_tiles = triton.cdiv(num_rows, ROWS) + max(len(weights) - 1, 0)
    x_grad, *weight_grads = _gradients(grad, weights, live)
    partials = grad.new_empty(num_tiles if any(live) else 0, dim, dtype=torch.promote_types(grad.dtype, torch.float32))
    with on_device(grad):
        triton_kernels.backward[(num_tiles,)](
            grad, x, _gains(weights, x), cos, sin, x_grad, partials, x if offsets is None else offsets, num_rows, num_heads, dim // 2,
            grad.stride(0), grad.stride(1), x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
            M=len(weights), NORM=bool(weights), PARTIALS=any(live), EPS=eps, ACC=accumulator(grad),
            ROWS=ROWS, HEADS=heads, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        if any(live):
            assert offsets is not None
            add_partials(partials, weight_grads, offsets, live, ROWS)
    return [x_grad, *weight_grads]


def _gradients(grad: torch.Tensor, weights: Tensors, live: Sequence[bool]) -> list[torch.Tensor]:
    return [grad.new_empty(grad.shape), *(weights[0].new_empty(grad.shape[2]) for alive in live if alive)]


@norm_rope_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weights: Tensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    eps: float,
    live: Sequence[bool],
) -> list[torch.Tensor]:
    return _gradients(grad, weights, live)


def _save(ctx, inputs, output) -> None:
    x, weights, cos, sin, offsets, ctx.eps = inputs
    ctx.normed = bool(weights)
    ctx.save_for_backward(cos, sin, *([x, offsets, *weights] if ctx.normed else []))


def _backward(ctx, grad: torch.Tensor):
    cos, sin, *normed = ctx.saved_tensors
    x, offsets, *weights = normed or [None, None]
    live = list(ctx.needs_input_grad[1]) if ctx.normed else []
    x_grad, *weight_grads = norm_rope_backward(grad, x, weights, cos, sin, offsets, ctx.eps, live)
    remaining = iter(weight_grads)
    return x_grad, [next(remaining) if alive else None for alive in live], None, None, None, None


norm_rope.register_autograd(_backward, setup_context=_save)
