"""Patches and the maps they were cut from. A patch vector is ordered (channel, row, column)."""

from __future__ import annotations

import torch

Grid = tuple[int, int]
"""(rows, columns) of an image in patches."""


def unpatchify(patches: torch.Tensor, grid: Grid, channels: int) -> torch.Tensor:
    """patches [B, rows * columns, channels * p * p] in raster order -> maps [B, channels, rows * p, columns * p]."""
    rows, columns = grid
    side = patch_side(patches.shape[-1], channels)
    maps = patches.reshape(len(patches), rows, columns, channels, side, side)
    return maps.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), channels, rows * side, columns * side)


def patchify(maps: torch.Tensor, side: int) -> torch.Tensor:
    """maps [B, channels, height, width] -> patches [B, (height / side) * (width / side), channels * side * side]."""
    batch, channels, height, width = maps.shape
    cut = maps.reshape(batch, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // side) * (width // side), channels * side * side)


def patch_side(patch_dim: int, channels: int) -> int:
    """p of a patch of channels * p * p numbers. Raises ValueError if there is none."""
    side = round((patch_dim / channels) ** 0.5)
    if side * side * channels != patch_dim:
        raise ValueError(f"a patch of {patch_dim} numbers is not {channels} channels x p x p for any p")
    return side


def runs_of_equal_grids(grids: tuple[Grid, ...]) -> list[tuple[Grid, int]]:
    """Neighbouring images of one grid, as (grid, number of images): each run is one dense tensor."""
    runs: list[tuple[Grid, int]] = []
    for grid in grids:
        if runs and runs[-1][0] == grid:
            runs[-1] = (grid, runs[-1][1] + 1)
        else:
            runs.append((grid, 1))
    return runs
