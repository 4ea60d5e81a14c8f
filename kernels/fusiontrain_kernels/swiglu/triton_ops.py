"""The Triton swiglu as an operator that torch.compile and autograd know."""

from __future__ import annotations

import torch
import triton

from fusiontrain_kernels._launch import accumulator, on_device, unit_stride
from fusiontrain_kernels.swiglu import triton_kernels

BLOCK = 1024


@torch.library.custom_op("fusiontrain::swiglu", mutates_args=())
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See the package."""
    gate, up = unit_stride(gate), unit_stride(up)
    out = gate.new_empty(gate.shape)
    with on_device(gate):
        triton_kernels.forward[(triton.cdiv(out.numel(), BLOCK),)](
            gate, up, out, out.numel(), gate.shape[1], gate.stride(0), up.stride(0), ACC=accumulator(gate), BLOCK=BLOCK
        )
    return out


@swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("fusiontrain::swiglu_backward", mutates_args=())
def swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of gate and up."""
    grad, gate, up = grad.contiguous(), unit_stride(gate), unit_stride(up)
    gate_grad, up_grad = grad.new_empty(grad.shape), grad.new_empty(grad.shape)
    with on_device(grad):
        triton_kernels.backward[(triton.cdiv(grad.numel(), BLOCK),)](
            grad, gate, up, gate_grad, up_grad, grad.numel(), gate.shape[1], gate.stride(0), up.stride(0), ACC=accumulator(grad), BLOCK=BLOCK
        )
    return gate_grad, up_grad


@swiglu_backward.register_fake
def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


swiglu.register_autograd(lambda ctx, grad: swiglu_backward(grad, *ctx.saved_tensors), setup_context=_save)
