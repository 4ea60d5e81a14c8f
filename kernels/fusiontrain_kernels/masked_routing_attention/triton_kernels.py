"""The Triton kernels of masked_routing_attention: the schedule of FlashAttention-2 (arXiv 2307.08691) with key intervals for a mask.

A tile of queries reads its rows' intervals, one slice after another, and from them knows which tiles of keys to visit at all and which lie
inside every row's interval and need no mask. Tiles of keys start at multiples of their size and are visited in ascending order, masked or
not. So the bits of a row depend on the keys it sees and on where they lie, not on the rows that share its tile.

Scores are scaled by log2(e) too, and exponentials are powers of two. `lse` [H, T] is log2 of a row's sum of them, -inf for a row without
keys. The backward has no atomics: a program owns the rows it writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

_BEYOND = tl.constexpr(2**30)


@triton.jit
def _head(base, head, stride):
    """Where a head begins. In 64 bits: heads may lie 2^31 elements apart."""
    return base + tl.cast(head, tl.int64) * stride


@triton.jit
def _load_rows(base, start, stride, num_rows, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Rows start .. start + BLOCK as [BLOCK, DP]; zeros behind D and behind num_rows."""
    rows = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, DP)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + (rows * stride + dims)  # 64 bits only in the scalar: registers are short
    exists = rows < num_rows - start
    return tl.load(pointers, mask=exists if D == DP else exists & (dims < D), other=0.0)


@triton.jit
def _store_rows(base, start, stride, num_rows, tile, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, DP)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + (rows * stride + dims)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(rows < num_rows - start) & (dims < D))


@triton.jit
def _intervals(ranges, rows, num_rows, g, G: tl.constexpr, BLOCK: tl.constexpr):
    """The rows' intervals in slice g within 0..num_rows, and four tile numbers: all between the first and the last are visited, those between the middle two
    lie in the interval of every row: none, where a row sees nothing. Rows behind the end have no say."""
    exists = rows < num_rows
    low = tl.maximum(tl.load(ranges + (rows * G + g) * 2, mask=exists, other=0), 0)
    high = tl.minimum(tl.load(ranges + (rows * G + g) * 2 + 1, mask=exists, other=0), num_rows)
    sees = low < high
    first = tl.min(tl.where(sees, low, _BEYOND), 0) // BLOCK
    last = (tl.max(tl.where(sees, high, 0), 0) + BLOCK - 1) // BLOCK
    first_full = (tl.max(tl.where(sees, low, 0), 0) + BLOCK - 1) // BLOCK
    last_full = tl.min(tl.where(exists, tl.where(sees, high, 0), _BEYOND), 0) // BLOCK
    some_full = first_full < last_full
    return low, high, first, tl.where(some_full, first_full, last), tl.where(some_full, last_full, last), last


@triton.jit
def _wanted(grad_rows, rows, NUM_GRAD: tl.constexpr):
    """Whose gradient is asked for: rows in any of NUM_GRAD intervals; all, where there is no list."""
    wanted = rows >= (_BEYOND if NUM_GRAD else 0)
    for n in range(NUM_GRAD):
        wanted = wanted | ((rows >= tl.load(grad_rows + 2 * n)) & (rows < tl.load(grad_rows + 2 * n + 1)))
    return wanted


@triton.jit
def _forward_tiles(acc, top, total, q, k, v, low, high, first, first_full, last_full, last, k_row, v_row, num_rows, SCALE2: tl.constexpr,
                   D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    for tile in range(first, last):
        start = tile * BN
        keys = _load_rows(k, start, k_row, num_rows, BN, D, DP)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee", out_dtype=ACC) * SCALE2
        if (tile < first_full) | (tile >= last_full):
            columns = start + tl.arange(0, BN)
            allowed = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
            scores = tl.where(allowed, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.math.exp2(scores - finite_top[:, None])
        shrink = tl.math.exp2(top - finite_top)
        values = _load_rows(v, start, v_row, num_rows, BN, D, DP)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
        top = new_top
    return acc, top, total


@triton.jit
def forward_kernel(q, k, v, key_ranges, out, lse, num_rows, q_row, q_head, k_row, k_head, v_row, v_head, H: tl.constexpr,
                   GROUP: tl.constexpr, G: tl.constexpr, SCALE2: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """out [T, H, D] and lse [H, T] of BM queries of one head."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # late rows see more: they start first
    head = tl.program_id(1)
    rows = start + tl.arange(0, BM)
    k = _head(k, head // GROUP, k_head)
    v = _head(v, head // GROUP, v_head)
    queries = _load_rows(_head(q, head, q_head), start, q_row, num_rows, BM, D, DP)
    acc = tl.zeros((BM, DP), ACC)
    top = tl.full((BM,), float("-inf"), ACC)
    total = tl.zeros((BM,), ACC)
    for g in range(G):
        low, high, first, first_full, last_full, last = _intervals(key_ranges, rows, num_rows, g, G, BN)
        acc, top, total = _forward_tiles(
            acc, top, total, queries, k, v, low, high, first, first_full, last_full, last, k_row, v_row, num_rows, SCALE2, D, DP, BN, ACC)  # fmt: skip
    blind = total == 0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    _store_rows(out + head * D, start, H * D, num_rows, acc, BM, D, DP)
    tl.store(_head(lse, head, num_rows) + rows, top + tl.math.log2(tl.where(blind, 1.0, total)), mask=rows < num_rows)


@triton.jit
def delta_kernel(out, d_out, delta, num_rows, o_row, o_head, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                 BM: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """delta [H, T] = sum over Dh of out * d_out. `out` is contiguous; d_out has its own strides."""
    start = tl.program_id(0) * BM
    head = tl.program_id(1)
    rows = start + tl.arange(0, BM)
    o = _load_rows(out + head * D, start, H * D, num_rows, BM, D, DP)
    do = _load_rows(_head(d_out, head, o_head), start, o_row, num_rows, BM, D, DP)
    tl.store(_head(delta, head, num_rows) + rows, tl.sum(o.to(ACC) * do.to(ACC), 1), mask=rows < num_rows)


@triton.jit
def _dq_tiles(acc, q, do, lse, delta, k, v, low, high, first, first_full, last_full, last, k_row, v_row, num_rows, SCALE2: tl.constexpr,
              D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    for tile in range(first, last):
        start = tile * BN
        keys = _load_rows(k, start, k_row, num_rows, BN, D, DP)
        values = _load_rows(v, start, v_row, num_rows, BN, D, DP)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee", out_dtype=ACC) * SCALE2
        weights = tl.math.exp2(scores - lse[:, None])
        if (tile < first_full) | (tile >= last_full):
            columns = start + tl.arange(0, BN)
            weights = tl.where((columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]), weights, 0.0)
        d_weights = tl.dot(do, tl.trans(values), input_precision="ieee", out_dtype=ACC)
        d_scores = weights * (d_weights - delta[:, None])
        acc = tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision="ieee", out_dtype=ACC)
    return acc


@triton.jit
def dq_kernel(q, k, v, key_ranges, grad_rows, d_out, lse, delta, dq, num_rows, q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head,
              H: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, NUM_GRAD: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr,
              D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """dq [T, H, D] of BM queries of one head; zeros for rows whose gradient nobody asks for, whose keys are not visited."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head = tl.program_id(1)
    rows = start + tl.arange(0, BM)
    exists = rows < num_rows
    k = _head(k, head // GROUP, k_head)
    v = _head(v, head // GROUP, v_head)
    queries = _load_rows(_head(q, head, q_head), start, q_row, num_rows, BM, D, DP)
    do = _load_rows(_head(d_out, head, o_head), start, o_row, num_rows, BM, D, DP)
    row_lse = tl.load(_head(lse, head, num_rows) + rows, mask=exists, other=float("inf"))
    row_delta = tl.load(_head(delta, head, num_rows) + rows, mask=exists, other=0.0)
    wanted = _wanted(grad_rows, rows, NUM_GRAD) & exists
    acc = tl.zeros((BM, DP), ACC)
    for g in range(tl.max(wanted.to(tl.int32), 0) * G):
        low, high, first, first_full, last_full, last = _intervals(key_ranges, rows, num_rows, g, G, BN)
        acc = _dq_tiles(
            acc, queries, do, row_lse, row_delta, k, v, low, high, first, first_full, last_full, last, k_row, v_row, num_rows,
            SCALE2, D, DP, BN, ACC)  # fmt: skip
    _store_rows(dq + head * D, start, H * D, num_rows, tl.where(wanted[:, None], acc * SCALE, 0.0), BM, D, DP)


@triton.jit
def _dkdv_tiles(dk, dv, k, v, q, do, lse, delta, low, high, first, first_full, last_full, last, q_row, o_row, num_rows, SCALE2: tl.constexpr,
                D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Scores are transposed, [keys, queries]: then neither they nor their gradient need to be for the products below."""
    for tile in range(first, last):
        start = tile * BM
        rows = start + tl.arange(0, BM)
        queries = _load_rows(q, start, q_row, num_rows, BM, D, DP)
        row_lse = tl.load(lse + rows, mask=rows < num_rows, other=float("inf"))
        scores = tl.dot(k, tl.trans(queries), input_precision="ieee", out_dtype=ACC) * SCALE2
        weights = tl.math.exp2(scores - row_lse[None, :])
        if (tile < first_full) | (tile >= last_full):
            weights = tl.where((rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None]), weights, 0.0)
        row_do = _load_rows(do, start, o_row, num_rows, BM, D, DP)
        dv = tl.dot(weights.to(row_do.dtype), row_do, dv, input_precision="ieee", out_dtype=ACC)
        row_delta = tl.load(delta + rows, mask=rows < num_rows, other=0.0)
        d_weights = tl.dot(v, tl.trans(row_do), input_precision="ieee", out_dtype=ACC)
        d_scores = weights * (d_weights - row_delta[None, :])
        dk = tl.dot(d_scores.to(queries.dtype), queries, dk, input_precision="ieee", out_dtype=ACC)
    return dk, dv


@triton.jit
def dkdv_kernel(q, k, v, query_ranges, grad_rows, d_out, lse, delta, dk, dv, num_rows, q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head,
                H: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, NUM_GRAD: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr,
                D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A program owns BN keys of one key head and goes through the query heads that read it: no two programs add to the same row."""
    start = tl.program_id(0) * BN
    kv_head = tl.program_id(1)
    keys = start + tl.arange(0, BN)
    key_tile = _load_rows(_head(k, kv_head, k_head), start, k_row, num_rows, BN, D, DP)
    value_tile = _load_rows(_head(v, kv_head, v_head), start, v_row, num_rows, BN, D, DP)
    wanted = _wanted(grad_rows, keys, NUM_GRAD) & (keys < num_rows)
    dk_acc = tl.zeros((BN, DP), ACC)
    dv_acc = tl.zeros((BN, DP), ACC)
    for turn in range(tl.max(wanted.to(tl.int32), 0) * G * GROUP):
        g = turn // GROUP
        head = kv_head * GROUP + turn % GROUP
        low, high, first, first_full, last_full, last = _intervals(query_ranges, keys, num_rows, g, G, BM)
        qh, doh = _head(q, head, q_head), _head(d_out, head, o_head)
        lseh, deltah = _head(lse, head, num_rows), _head(delta, head, num_rows)
        dk_acc, dv_acc = _dkdv_tiles(
            dk_acc, dv_acc, key_tile, value_tile, qh, doh, lseh, deltah, low, high, first, first_full, last_full, last,
            q_row, o_row, num_rows, SCALE2, D, DP, BM, ACC)  # fmt: skip
    kv_row = (H // GROUP) * D
    _store_rows(dk + kv_head * D, start, kv_row, num_rows, tl.where(wanted[:, None], dk_acc * SCALE, 0.0), BN, D, DP)
    _store_rows(dv + kv_head * D, start, kv_row, num_rows, tl.where(wanted[:, None], dv_acc, 0.0), BN, D, DP)
