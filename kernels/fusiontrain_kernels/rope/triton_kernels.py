"""Rotary embedding in Triton: a row with all its heads per program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(
    x, cos, sin, out, H, HALF, stride_row, stride_head, stride_cos, stride_sin,
    BACKWARD: tl.constexpr, ACC: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, H, 2 * HALF], contiguous: x with its pairs turned by the row's angles; BACKWARD applies the transpose of that."""
    row = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    mask = (head[:, None] < H) & (i[None, :] < HALF)
    source = x + row * stride_row + head[:, None] * stride_head + i[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(ACC)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(ACC)
    angle = i < HALF
    cos_first = tl.load(cos + row * stride_cos + i, mask=angle, other=0.0).to(ACC)[None, :]
    cos_second = tl.load(cos + row * stride_cos + HALF + i, mask=angle, other=0.0).to(ACC)[None, :]
    sin_first = tl.load(sin + row * stride_sin + i, mask=angle, other=0.0).to(ACC)[None, :]
    sin_second = tl.load(sin + row * stride_sin + HALF + i, mask=angle, other=0.0).to(ACC)[None, :]
    if BACKWARD:
        turned_first = first * cos_first + second * sin_second
        turned_second = second * cos_second - first * sin_first
    else:
        turned_first = first * cos_first - second * sin_first
        turned_second = second * cos_second + first * sin_second
    target = out + row * H * (2 * HALF) + head[:, None] * (2 * HALF) + i[None, :]
    tl.store(target, turned_first.to(out.dtype.element_ty), mask=mask)
    tl.store(target + HALF, turned_second.to(out.dtype.element_ty), mask=mask)
