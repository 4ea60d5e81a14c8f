"""The Triton kernels of modality_gemm. Nothing here asks the device for a number: the borders of the modalities stay there.

A launch has `cdiv(T, BM) + M - 1` row tiles, the most that T rows in M segments can need. Each finds its modality by walking the M
offsets; those left over return. No tile lies in two modalities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusiontrain_kernels._segment_kernels import choose_live, locate


@triton.jit
def _swizzle(pid, num_rows, num_columns, GROUP: tl.constexpr):
    """Program -> (row tile, column tile), GROUP row tiles side by side so that they share the weight in the L2 cache."""
    per_group = GROUP * num_columns
    first = (pid // per_group) * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def _product(
    acc, x, weight, row, end, column, N, K, stride_x, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc + x[row : row + BM] @ B[:, column : column + BN]; B [K, N] is weight.T, or weight itself where TRANSPOSED."""
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    row_mask = rows[:, None] < end - row
    column_mask = columns < N - column
    x_tile = x + row.to(tl.int64) * stride_x + rows[:, None] * stride_x + inner[None, :]
    if TRANSPOSED:
        w_tile = weight + column.to(tl.int64) + inner[:, None] * stride_w + columns[None, :]
        w_step = BK * stride_w
    else:
        w_tile = weight + column.to(tl.int64) * stride_w + columns[None, :] * stride_w + inner[:, None]
        w_step = BK
    for k in range(0, K, BK):
        if EVEN:
            a = tl.load(x_tile, mask=row_mask, other=0.0)
            b = tl.load(w_tile, mask=column_mask[None, :], other=0.0)
        else:
            a = tl.load(x_tile, mask=row_mask & (inner[None, :] < K - k), other=0.0)
            b = tl.load(w_tile, mask=column_mask[None, :] & (inner[:, None] < K - k), other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
        x_tile += BK
        w_tile += w_step
    return acc


@triton.jit
def gemm(
    xs, weights, biases, out, offsets, T, N, K, stride_x, stride_w,
    M: tl.constexpr, PAIRS: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [T, N] = sum over pairs p of xs[p] [T, K] @ B_p, where B_p [K, N] is the row's modality's entry of weights[p], see `_product`."""
    tile, column_tile = _swizzle(tl.program_id(0), tl.cdiv(T, BM) + M - 1, tl.cdiv(N, BN), GROUP)
    column = column_tile * BN
    acc = tl.zeros((BM, BN), ACC)
    row, end, weight = locate(tile, offsets, weights[0], M, BM)
    if row < 0:
        return
    for p in tl.static_range(PAIRS):
        row, end, weight = locate(tile, offsets, weights[p], M, BM)
        acc = _product(acc, xs[p], weight, row, end, column, N, K, stride_x, stride_w, BM, BN, BK, TRANSPOSED, EVEN, ACC)
    rows, columns = tl.arange(0, BM), column + tl.arange(0, BN)
    if HAS_BIAS:
        row, end, bias = locate(tile, offsets, biases, M, BM)
        acc += tl.load(bias + columns, mask=columns < N, other=0.0)[None, :].to(ACC)
    out_tile = out + row.to(tl.int64) * N + rows[:, None] * N + columns[None, :]
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=(rows[:, None] < end - row) & (columns[None, :] < N))


@triton.jit
def gemm_swiglu(
    x, gates, ups, gate_out, up_out, out, offsets, T, N, K, stride_x, stride_w,
    M: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [T, N] = silu(x @ gate.T) * (x @ up.T); both products are rounded to the dtype of out first, and kept for the backward."""
    tile, column_tile = _swizzle(tl.program_id(0), tl.cdiv(T, BM) + M - 1, tl.cdiv(N, BN), GROUP)
    column = column_tile * BN
    row, end, gate_weight = locate(tile, offsets, gates, M, BM)
    if row < 0:
        return
    row, end, up_weight = locate(tile, offsets, ups, M, BM)
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    row_mask = rows[:, None] < end - row
    column_mask = columns[None, :] < N - column
    x_tile = x + row.to(tl.int64) * stride_x + rows[:, None] * stride_x + inner[None, :]
    w_tile = column.to(tl.int64) * stride_w + columns[None, :] * stride_w + inner[:, None]
    gate = tl.zeros((BM, BN), ACC)
    up = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        k_mask = inner < K - k
        a = tl.load(x_tile, mask=row_mask if EVEN else row_mask & k_mask[None, :], other=0.0)
        w_mask = column_mask if EVEN else column_mask & k_mask[:, None]
        gate = tl.dot(a, tl.load(gate_weight + w_tile, mask=w_mask, other=0.0), gate, input_precision="ieee", out_dtype=ACC)
        up = tl.dot(a, tl.load(up_weight + w_tile, mask=w_mask, other=0.0), up, input_precision="ieee", out_dtype=ACC)
        x_tile += BK
        w_tile += BK
    place = row.to(tl.int64) * N + rows[:, None] * N + column + columns[None, :]
    mask = row_mask & column_mask
    gate = gate.to(out.dtype.element_ty)
    up = up.to(out.dtype.element_ty)
    tl.store(gate_out + place, gate, mask=mask)
    tl.store(up_out + place, up, mask=mask)
    wide = gate.to(ACC)
    activated = (wide / (1.0 + tl.exp(-wide))).to(out.dtype.element_ty).to(ACC)
    tl.store(out + place, (activated * up.to(ACC)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def wgrad(
    x, grad, outs, bias_outs, offsets, N, K, stride_x, stride_grad,
    M: tl.constexpr, LIVE: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """outs[m] [N, K] (+)= grad[rows of m].T @ x[rows of m], for the modalities in LIVE: (BM, BN) tiles, BK rows a step.

    No rows give zeros. bias_outs[m] [N] (+)= the sum of grad's rows. The order of every sum is fixed.
    """
    n_tile, k_tile = _swizzle(tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(K, BN), GROUP)
    low, high, out, bias_out = choose_live(tl.program_id(1), offsets, outs, bias_outs, M, LIVE)
    n, k, inner = n_tile * BM + tl.arange(0, BM), k_tile * BN + tl.arange(0, BN), tl.arange(0, BK)
    out += (n_tile * BM).to(tl.int64) * K + k_tile * BN
    grad_tile = grad + low.to(tl.int64) * stride_grad + inner[None, :] * stride_grad + n[:, None]
    x_tile = x + low.to(tl.int64) * stride_x + inner[:, None] * stride_x + k[None, :]
    acc = tl.zeros((BM, BN), ACC)
    bias = tl.zeros((BM,), ACC)
    for row in range(low, high, BK):
        mask = inner < high - row
        g = tl.load(grad_tile, mask=mask[None, :] & (n[:, None] < N), other=0.0)
        acc = tl.dot(g, tl.load(x_tile, mask=mask[:, None] & (k[None, :] < K), other=0.0), acc, input_precision="ieee", out_dtype=ACC)
        if HAS_BIAS:
            bias += tl.sum(g.to(ACC), axis=1)
        grad_tile += BK * stride_grad
        x_tile += BK * stride_x
    place = tl.arange(0, BM)[:, None] * K + tl.arange(0, BN)[None, :]
    mask = (n[:, None] < N) & (k[None, :] < K)
    if ACCUMULATE:
        acc += tl.load(out + place, mask=mask, other=0.0).to(ACC)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)
    if HAS_BIAS:  # noqa: SIM102
        if k_tile == 0:
            if ACCUMULATE:
                bias += tl.load(bias_out + n, mask=n < N, other=0.0).to(ACC)
            tl.store(bias_out + n, bias.to(bias_out.dtype.element_ty), mask=n < N)
