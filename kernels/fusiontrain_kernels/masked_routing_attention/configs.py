"""Tile sizes of the Triton kernels, by architecture, kernel and padded head dim. Each row is held to the gate of `make aot`.

dk and dv of 256 dims fill the registers with 64 keys a tile, which is what the products of sm_90 and sm_100 need: there they have 32 keys and
the tensor-core instruction of sm_80.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusiontrain_kernels._launch import architecture, nearest


class Config(NamedTuple):
    """BM queries and BN keys per tile; delta has no keys."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


HEAD_DIMS = (64, 128, 256)
"""Padded to the next power of two: 96 uses the row of 128."""

TABLE: dict[int, dict[str, dict[int, Config]]] = {
    80: {
        "forward": {64: Config(64, 64, 4, 2), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
        "dq": {64: Config(64, 32, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        "dkdv": {64: Config(64, 32, 4, 2), 128: Config(64, 64, 8, 1), 256: Config(32, 32, 8, 1)},
        "delta": {64: Config(64, 0, 4, 1), 128: Config(64, 0, 4, 1), 256: Config(32, 0, 4, 1)},
    },
    90: {
        "forward": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)},
        "dq": {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 16, 8, 2)},
        "dkdv": {64: Config(64, 128, 8, 1), 128: Config(32, 128, 8, 2), 256: Config(32, 32, 8, 1)},
        "delta": {64: Config(64, 0, 4, 1), 128: Config(64, 0, 4, 1), 256: Config(32, 0, 4, 1)},
    },
    100: {
        "forward": {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 2)},
        "dq": {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 1)},
        "dkdv": {64: Config(64, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
        "delta": {64: Config(32, 0, 4, 1), 128: Config(64, 0, 8, 1), 256: Config(32, 0, 4, 1)},
    },
}

WIDE = Config(32, 32, 4, 1)
"""float32 and float64, on any GPU: for checks, not for speed."""

INTERPRETED = Config(32, 16, 4, 1)


def select(kernel: str, x: torch.Tensor) -> Config:
    """The tiles for heads like those of x [T, H, Dh], on its device."""
    if not x.is_cuda:
        return INTERPRETED
    if x.element_size() > 2:
        return WIDE
    return nearest(TABLE, architecture(x))[kernel][min(dim for dim in HEAD_DIMS if dim >= x.shape[-1])]
