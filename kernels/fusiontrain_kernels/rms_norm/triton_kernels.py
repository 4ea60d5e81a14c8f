"""RMS norm in Triton: a row per program forward; backward a block of rows of one modality, whose weight gradients a second kernel adds up."""

from __future__ import annotations

import triton
import triton.language as tl

from fusiontrain_kernels._segment_kernels import choose_live, locate


@triton.jit
def forward(
    x, residual, weights, out, summed, rstds, offsets, D, stride_x, stride_residual,
    M: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = weight * normed, where normed is of x, or, if ADD, of summed = x + residual; rstds [T] for the backward."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < D
    _, _, weight = locate(row, offsets, weights, M, 1)
    place = row.to(tl.int64) * D + column
    value = tl.load(x + row.to(tl.int64) * stride_x + column, mask=mask, other=0.0)
    if ADD:
        value = (value.to(ACC) + tl.load(residual + row.to(tl.int64) * stride_residual + column, mask=mask, other=0.0).to(ACC)).to(value.dtype)
        tl.store(summed + place, value, mask=mask)
    wide = value.to(ACC)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / D + EPS)
    tl.store(rstds + row, rstd)
    normed = (wide * rstd).to(out.dtype.element_ty).to(ACC)
    gain = tl.load(weight + column, mask=mask, other=0.0).to(ACC)
    tl.store(out + place, (gain * normed).to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    grad, grad_summed, x, weights, rstds, x_grad, partials, offsets, D, stride_grad, stride_summed, stride_x,
    M: tl.constexpr, ADD: tl.constexpr, PARTIALS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x_grad [T, D], of what was normed; with ADD it takes in grad_summed, its other gradient. partials [tiles, D]: weight gradients."""
    tile = tl.program_id(0)
    row, end, weight = locate(tile, offsets, weights, M, ROWS)
    if row < 0:
        return
    column = tl.arange(0, BLOCK)
    mask = column < D
    gain = tl.load(weight + column, mask=mask, other=0.0).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    for r in range(row, tl.minimum(row + ROWS, end)):
        i = tl.cast(r, tl.int64)
        d = tl.load(grad + i * stride_grad + column, mask=mask, other=0.0).to(ACC)
        rstd = tl.load(rstds + r)
        normed = tl.load(x + i * stride_x + column, mask=mask, other=0.0).to(ACC) * rstd
        if PARTIALS:
            total += d * normed.to(grad.dtype.element_ty).to(ACC)
        d *= gain
        d = rstd * (d - normed * (tl.sum(d * normed, axis=0) / D))
        if ADD:
            d += tl.load(grad_summed + i * stride_summed + column, mask=mask, other=0.0).to(ACC)
        tl.store(x_grad + i * D + column, d.to(x_grad.dtype.element_ty), mask=mask)
    if PARTIALS:
        tl.store(partials + tl.cast(tile, tl.int64) * D + column, total, mask=mask)


@triton.jit
def add_partials(
    partials, outs, offsets, D,
    M: tl.constexpr, LIVE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """outs[m] [D] = the sum of m's rows of partials, in a fixed order, for the modalities in LIVE. A modality without rows gets zeros."""
    _, _, out, _ = choose_live(tl.program_id(1), offsets, outs, outs, M, LIVE)
    first, last, tile, seen = 0, 0, 0, 0
    for m in tl.static_range(M):
        num_tiles = tl.cdiv(tl.load(offsets + m + 1) - tl.load(offsets + m), ROWS)
        if (LIVE >> m) & 1:
            here = tl.program_id(1) == seen
            first = tl.where(here, tile, first)
            last = tl.where(here, tile + num_tiles, last)
            seen += 1
        tile += num_tiles
    column, step = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP)
    total = tl.zeros((STEP, BLOCK), ACC)
    for t in range(first, last, STEP):
        row = t + step
        mask = (row[:, None] < last) & (column[None, :] < D)
        total += tl.load(partials + row[:, None].to(tl.int64) * D + column[None, :], mask=mask, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < D)
