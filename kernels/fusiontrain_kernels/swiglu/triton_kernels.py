"""SwiGLU in Triton: one pass over memory each way."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(gate, up, out, size, F, stride_gate, stride_up, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, F], contiguous; rows of gate and up may lie apart."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, row, column = i < size, i // F, i % F
    g = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(ACC)
    u = tl.load(up + row * stride_up + column, mask=mask, other=0.0).to(ACC)
    activated = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(ACC)
    tl.store(out + i, (activated * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward(grad, gate, up, gate_grad, up_grad, size, F, stride_gate, stride_up, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of gate and up [T, F], contiguous as grad is."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, row, column = i < size, i // F, i % F
    d = tl.load(grad + i, mask=mask, other=0.0).to(ACC)
    g = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(ACC)
    u = tl.load(up + row * stride_up + column, mask=mask, other=0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    tl.store(up_grad + i, (d * g * sigmoid).to(up_grad.dtype.element_ty), mask=mask)
    tl.store(gate_grad + i, (d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(gate_grad.dtype.element_ty), mask=mask)
