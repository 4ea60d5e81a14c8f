"""The Triton rms_norm as operators that torch.compile and autograd know. Borders of modalities are `offsets`, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from fusiontrain_kernels._launch import accumulator, on_device, unit_stride
from fusiontrain_kernels.rms_norm import triton_kernels

Tensors = Sequence[torch.Tensor]
ROWS = 16  # rows of one block of the backward
COLUMNS, STEP = 128, 16  # of the partial sums, at a time


def num_warps(block: int) -> int:
    """One warp for 512 elements, 16 at most."""
    return min(max(block // 512, 1), 16)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("fusiontrain::rms_norm", mutates_args=())
def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weights: Tensors, offsets: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> normed, x + residual (empty without a residual), 1 / root mean square [T]."""
    x, (num_rows, dim), block = unit_stride(x), x.shape, triton.next_power_of_2(x.shape[1])
    other = x if residual is None else unit_stride(residual)
    out, summed, rstds = _outputs(x, residual)
    with on_device(x):
        triton_kernels.forward[(num_rows,)](
            x, other, tuple(weight.contiguous() for weight in weights), out, summed, rstds, offsets, dim, x.stride(0), other.stride(0),
            M=len(weights), EPS=eps, ADD=residual is not None, ACC=accumulator(x), BLOCK=block, num_warps=num_warps(block),
        )  # fmt: skip
    return out, summed, rstds


def _outputs(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    summed = x.new_empty(0, x.shape[1]) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), summed, x.new_empty(x.shape[0], dtype=_wide(x))


@rms_norm.register_fake
def _(x: torch.Tensor, residual: torch.Tensor | None, weights: Tensors, offsets: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(x, residual)


@torch.library.custom_op("fusiontrain::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: torch.Tensor, grad_summed: torch.Tensor | None, x: torch.Tensor, weights: Tensors, rstds: torch.Tensor, offsets: torch.Tensor, live: Sequence[bool]
) -> list[torch.Tensor]:
    """-> gradient of what was normed, then those of the live modalities' weights."""
    grad, x, (num_rows, dim), block = unit_stride(grad), unit_stride(x), x.shape, triton.next_power_of_2(x.shape[1])
    other, gains = grad if grad_summed is None else unit_stride(grad_summed), tuple(weight.contiguous() for weight in weights)
    num_tiles = triton.cdiv(num_rows, ROWS) + len(weights) - 1
    x_grad, *weight_grads = _gradients(x, weights, live)
    partials = x.new_empty(num_tiles if any(live) else 0, dim, dtype=_wide(x))
    with on_device(x):
        triton_kernels.backward[(num_tiles,)](
            grad, other, x, gains, rstds, x_grad, partials, offsets, dim, grad.stride(0), other.stride(0), x.stride(0),
            M=len(weights), ADD=grad_summed is not None, PARTIALS=any(live), ACC=accumulator(x), BLOCK=block, ROWS=ROWS, num_warps=num_warps(block),
        )  # fmt: skip
        if any(live):
            add_partials(partials, weight_grads, offsets, live, ROWS)
    return [x_grad, *weight_grads]


def add_partials(partials: torch.Tensor, outs: Tensors, offsets: torch.Tensor, live: Sequence[bool], rows: int) -> None:
    """outs[i] [D] = the sum of partials [tiles, D] over the tiles of `rows` rows that are the i-th live modality's."""
    remaining, bits = iter(outs), sum(alive << m for m, alive in enumerate(live))
    places = tuple(next(remaining) if alive else outs[0] for alive in live)
    triton_kernels.add_partials[(triton.cdiv(partials.shape[1], COLUMNS), len(outs))](
        partials, places, offsets, partials.shape[1], M=len(live), LIVE=bits, ACC=accumulator(partials), ROWS=rows, BLOCK=COLUMNS, STEP=STEP
    )


def _gradients(x: torch.Tensor, weights: Tensors, live: Sequence[bool]) -> list[torch.Tensor]:
    return [x.new_empty(x.shape), *(weights[0].new_empty(x.shape[1]) for alive in live if alive)]


@rms_norm_backward.register_fake
def _(
    grad: torch.Tensor, grad_summed: torch.Tensor | None, x: torch.Tensor, weights: Tensors, rstds: torch.Tensor, offsets: torch.Tensor, live: Sequence[bool]
) -> list[torch.Tensor]:
    return _gradients(x, weights, live)


def _save(ctx, inputs, output) -> None:
    x, residual, weights, offsets, _ = inputs
    _, summed, rstds = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(*([rstds] if ctx.has_residual else [summed, rstds]))
    ctx.save_for_backward(summed if ctx.has_residual else x, rstds, offsets, *weights)


def _backward(ctx, grad: torch.Tensor, grad_summed: torch.Tensor | None, _rstds: object):
    x, rstds, offsets, *weights = ctx.saved_tensors
    live = list(ctx.needs_input_grad[2])
    x_grad, *weight_grads = rms_norm_backward(grad, grad_summed if ctx.has_residual else None, x, weights, rstds, offsets, live)
    remaining = iter(weight_grads)
    return x_grad, x_grad if ctx.has_residual else None, [next(remaining) if alive else None for alive in live], None, None


rms_norm.register_autograd(_backward, setup_context=_save)
