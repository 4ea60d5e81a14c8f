"""Norm of heads and rotary embedding in Triton, one pass over memory each way. Halves of a head are two tiles [heads, Dh / 2]."""

from __future__ import annotations

import triton
import triton.language as tl

from fusiontrain_kernels._segment_kernels import locate


@triton.jit
def _load_halves(start, HALF, mask, ACC: tl.constexpr):
    """-> both halves, zero where masked."""
    return tl.load(start, mask=mask, other=0.0).to(ACC), tl.load(start + HALF, mask=mask, other=0.0).to(ACC)


@triton.jit
def _load_angles(cos, sin, row, stride_cos, stride_sin, HALF, i, ACC: tl.constexpr):
    """-> the row's cos and sin for the first half [1, Dh / 2], then both for the second."""
    mask = i < HALF
    cos_first, cos_second = _load_halves(cos + row * stride_cos + i, HALF, mask, ACC)
    sin_first, sin_second = _load_halves(sin + row * stride_sin + i, HALF, mask, ACC)
    return cos_first[None, :], sin_first[None, :], cos_second[None, :], sin_second[None, :]


@triton.jit
def _rstd(first, second, HALF, EPS: tl.constexpr):
    """1 / root mean square of every head [heads, 1]."""
    return (1.0 / tl.sqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + EPS))[:, None]


@triton.jit
def forward(
    x, weights, cos, sin, out, offsets, H, HALF, stride_x, stride_head, stride_cos, stride_sin,
    M: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, H, 2 * HALF], contiguous: x with its heads normed, if NORM, and turned. A program has one row and HEADS heads."""
    dtype = out.dtype.element_ty
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    mask = (head < H) & (i[None, :] < HALF)
    first, second = _load_halves(x + row * stride_x + head * stride_head + i[None, :], HALF, mask, ACC)
    if NORM:
        _, _, weight = locate(tl.program_id(0), offsets, weights, M, 1)
        gain_first, gain_second = _load_halves(weight + i, HALF, i < HALF, ACC)
        rstd = _rstd(first, second, HALF, EPS)
        first = ((first * rstd).to(dtype).to(ACC) * gain_first[None, :]).to(dtype).to(ACC)
        second = ((second * rstd).to(dtype).to(ACC) * gain_second[None, :]).to(dtype).to(ACC)
    cos_first, sin_first, cos_second, sin_second = _load_angles(cos, sin, row, stride_cos, stride_sin, HALF, i, ACC)
    target = out + row * H * (2 * HALF) + head * (2 * HALF) + i[None, :]
    tl.store(target, (first * cos_first - second * sin_first).to(dtype), mask=mask)
    tl.store(target + HALF, (second * cos_second + first * sin_second).to(dtype), mask=mask)


@triton.jit
def backward(
    grad, x, weights, cos, sin, x_grad, partials, offsets, T, H, HALF, stride_grad, stride_grad_head, stride_x, stride_head, stride_cos, stride_sin,
    M: tl.constexpr, NORM: tl.constexpr, PARTIALS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_grad [T, H, 2 * HALF], contiguous. A program has ROWS rows of one modality; partials [tiles, 2 * HALF]: its weight gradients.

    Without NORM neither x nor the modality matters. The roots are taken again: x is read anyway.
    """
    dtype = x_grad.dtype.element_ty
    tile, i = tl.program_id(0), tl.arange(0, BLOCK)
    if NORM:
        low, end, weight = locate(tile, offsets, weights, M, ROWS)
        if low < 0:
            return
        gain_first, gain_second = _load_halves(weight + i, HALF, i < HALF, ACC)
    else:
        low, end = tile * ROWS, T
    total_first, total_second = tl.zeros((HEADS, BLOCK), ACC), tl.zeros((HEADS, BLOCK), ACC)
    for r in range(low, tl.minimum(low + ROWS, end)):
        row = tl.cast(r, tl.int64)
        cos_first, sin_first, cos_second, sin_second = _load_angles(cos, sin, row, stride_cos, stride_sin, HALF, i, ACC)
        for h in range(0, H, HEADS):
            head = h + tl.arange(0, HEADS)[:, None]
            mask = (head < H) & (i[None, :] < HALF)
            d_first, d_second = _load_halves(grad + row * stride_grad + head * stride_grad_head + i[None, :], HALF, mask, ACC)
            first = d_first * cos_first + d_second * sin_second
            second = d_second * cos_second - d_first * sin_first
            if NORM:
                normed_first, normed_second = _load_halves(x + row * stride_x + head * stride_head + i[None, :], HALF, mask, ACC)
                rstd = _rstd(normed_first, normed_second, HALF, EPS)
                normed_first *= rstd
                normed_second *= rstd
                if PARTIALS:
                    total_first += tl.where(mask, first * normed_first.to(dtype).to(ACC), 0.0)
                    total_second += tl.where(mask, second * normed_second.to(dtype).to(ACC), 0.0)
                first *= gain_first[None, :]
                second *= gain_second[None, :]
                mean = (tl.sum(first * normed_first + second * normed_second, axis=1) / (2 * HALF))[:, None]
                first = rstd * (first - normed_first * mean)
                second = rstd * (second - normed_second * mean)
            target = x_grad + row * H * (2 * HALF) + head * (2 * HALF) + i[None, :]
            tl.store(target, first.to(dtype), mask=mask)
            tl.store(target + HALF, second.to(dtype), mask=mask)
    if PARTIALS:
        place = partials + tl.cast(tile, tl.int64) * (2 * HALF) + i
        tl.store(place, tl.sum(total_first, axis=0), mask=i < HALF)
        tl.store(place + HALF, tl.sum(total_second, axis=0), mask=i < HALF)
