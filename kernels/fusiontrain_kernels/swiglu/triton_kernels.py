"""SwiGLU in Triton: one pass over memory each way, a piece of a row per program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(gate, up, out, F, stride_gate, stride_up, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, F], contiguous; rows of gate and up may lie apart."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    g = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(ACC)
    u = tl.load(up + row * stride_up + column, mask=mask, other=0.0).to(ACC)
    activated = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(ACC)
    tl.store(out + row * F + column, (activated * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward(grad, gate, up, gate_grad, up_grad, F, stride_grad, stride_gate, stride_up, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of gate and up [T, F], contiguous; rows of grad, gate and up may lie apart."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    d = tl.load(grad + row * stride_grad + column, mask=mask, other=0.0).to(ACC)
    g = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(ACC)
    u = tl.load(up + row * stride_up + column, mask=mask, other=0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    tl.store(up_grad + row * F + column, (d * g * sigmoid).to(up_grad.dtype.element_ty), mask=mask)
    tl.store(gate_grad + row * F + column, (d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(gate_grad.dtype.element_ty), mask=mask)
