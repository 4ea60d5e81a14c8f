"""The Triton swiglu as an operator that torch.compile and autograd know."""

from __future__ import annotations

import torch
import triton

from fusiontrain_kernels._launch import accumulator, on_device, unit_stride
from fusiontrain_kernels.swiglu import triton_kernels

BLOCK = 1024


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], BLOCK)


@torch.library.custom_op("fusiontrain::swiglu", mutates_args=())
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See the package."""
    gate, up = unit_stride(gate), unit_stride(up)
    out = gate.new_empty(gate.shape)
    with on_device(gate):
        triton_kernels.forward[_grid(gate)](gate, up, out, gate.shape[1], gate.stride(0), up.stride(0), ACC=accumulator(gate), BLOCK=BLOCK)
    return out


@swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("fusiontrain::swiglu_backward", mutates_args=())
def swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of gate and up."""
    grad, gate, up = unit_stride(grad), unit_stride(gate), unit_stride(up)
    gate_grad, up_grad = grad.new_empty(grad.shape), grad.new_empty(grad.shape)
    with on_device(grad):
        triton_kernels.backward[_grid(grad)](
            grad, gate, up, gate_grad, up_grad, grad.shape[1], grad.stride(0), gate.stride(0), up.stride(0), ACC=accumulator(grad), BLOCK=BLOCK
        )
    return gate_grad, up_grad


@swiglu_backward.register_fake
def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


swiglu.register_autograd(lambda ctx, grad: swiglu_backward(grad, *ctx.saved_tensors), setup_context=_save)
