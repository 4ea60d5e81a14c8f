"""The Triton rope as an operator that torch.compile and autograd know."""

from __future__ import annotations

import torch
import triton

from fusiontrain_kernels._launch import accumulator, on_device, unit_stride
from fusiontrain_kernels.rope import triton_kernels


@torch.library.custom_op("fusiontrain::rope", mutates_args=())
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    """The turn, or with `backward` its transpose, which is the gradient. cos and sin get no gradient."""
    x, cos, sin = unit_stride(x), unit_stride(cos), unit_stride(sin)
    num_rows, num_heads, dim = x.shape
    out = x.new_empty(x.shape)
    heads, block = triton.next_power_of_2(num_heads), triton.next_power_of_2(dim // 2)
    with on_device(x):
        triton_kernels.turn[(num_rows,)](
            x, cos, sin, out, num_heads, dim // 2, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
            BACKWARD=backward, ACC=accumulator(x), HEADS=heads, BLOCK=block, num_warps=min(max(heads * block // 256, 1), 8),
        )  # fmt: skip
    return out


@rope.register_fake
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    _, cos, sin, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


rope.register_autograd(lambda ctx, grad: (rope(grad, *ctx.saved_tensors, not ctx.backward), None, None, None), setup_context=_save)
