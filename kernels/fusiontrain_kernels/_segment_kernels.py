"""How a Triton program finds its modality: by walking the offsets, which stay on the device.

Rows are cut into tiles that never lie in two modalities: at most `cdiv(T, BM) + M - 1` of them, which is how many programs are launched.
Those left over find no row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(tile, offsets, weights, M: tl.constexpr, BM: tl.constexpr):
    """-> first row of this row tile (-1: none), end of its segment, the segment's entry of `weights`."""
    row, end, weight, first = -1, 0, weights[0], 0
    for m in tl.static_range(M):
        low = tl.load(offsets + m)
        high = tl.load(offsets + m + 1)
        num_tiles = tl.cdiv(high - low, BM)
        inside = (tile >= first) & (tile < first + num_tiles)
        row = tl.where(inside, low + (tile - first) * BM, row)
        end = tl.where(inside, high, end)
        weight = tl.where(inside, weights[m], weight)
        first += num_tiles
    return row, end, weight


@triton.jit
def choose_live(index, offsets, outs, bias_outs, M: tl.constexpr, LIVE: tl.constexpr):
    """The index-th modality whose bit is set in LIVE -> its first and last row and its outputs."""
    low, high, out, bias_out, seen = 0, 0, outs[0], bias_outs[0], 0
    for m in tl.static_range(M):
        if (LIVE >> m) & 1:
            here = index == seen
            low = tl.where(here, tl.load(offsets + m), low)
            high = tl.where(here, tl.load(offsets + m + 1), high)
            out = tl.where(here, outs[m], out)
            bias_out = tl.where(here, bias_outs[m], bias_out)
            seen += 1
    return low, high, out, bias_out
