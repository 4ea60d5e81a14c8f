"""Images in and out: a patcher takes noised patches to the model's width and back to a prediction per patch.

Both patchers take `values` [N, C] (N patches of I images, raster order), `levels` [I] (noise level in [0, 1]), `image_ids` [N] and the
host-side `grids` of the images. `encode` returns ([N, D], state) and `decode` takes that state back; any N, also 0, works and keeps
every parameter in the graph, so a batch without images gives zero gradients instead of none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fusiontrain.models.layers.size import num_products
from fusiontrain.models.modalities.patches import Grid

TIMESTEP_FEATURES = 256
TIMESTEP_SCALE = 1000.0


def sinusoid(values: torch.Tensor, num_features: int, max_period: float = 10_000.0) -> torch.Tensor:
    """values [...] -> [..., num_features] float32: cosines, then sines, of geometric frequencies from 1 to 1 / max_period."""
    half = num_features // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """levels [I] in [0, 1] -> [I, width]: a sinusoid of 1000 * level, then a two-layer network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(TIMESTEP_FEATURES, width)
        self.out = nn.Linear(width, width)

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        features = sinusoid(levels * TIMESTEP_SCALE, TIMESTEP_FEATURES).to(self.up.weight.dtype)
        return self.out(nn.functional.silu(self.up(features)))


def grid_positions(grids: tuple[Grid, ...], device: torch.device) -> torch.Tensor:
    """Row and column of every patch, [N, 2] int64, raster order."""
    cells = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in grids]
    return (torch.cat(cells) if cells else torch.zeros(0, 2, dtype=torch.int64)).to(device)


class GridEmbedding(nn.Module):
    """A fixed two-dimensional sin-cos table, computed where needed: half of the features for the row, half for the column."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, grids: tuple[Grid, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        positions = grid_positions(grids, device)  # [N, 2]
        return sinusoid(positions, self.dim // 2).flatten(1).to(dtype)


class LinearPatcher(nn.Module):
    """Transfusion's linear patcher (section 3): C numbers -> D, and back.

    The paper adds the timestep embedding to the patch before the linear layer; here it is added after, which can express the same
    and does not squeeze the timestep through C numbers.
    """

    def __init__(self, patch_dim: int, dim: int, position_embedding: str) -> None:
        super().__init__()
        self.input = nn.Linear(patch_dim, dim)
        self.timestep = TimestepEmbedding(dim)
        self.position = GridEmbedding(dim) if position_embedding == "sincos2d" else None
        self.output = nn.Linear(dim, patch_dim)

    def encode(self, values: torch.Tensor, levels: torch.Tensor, image_ids: torch.Tensor, grids: tuple[Grid, ...]) -> tuple[torch.Tensor, Any]:
        x = self.input(values.to(self.input.weight.dtype)) + self.timestep(levels)[image_ids]
        if self.position is not None:
            x = x + self.position(grids, x.device, x.dtype)
        return x, None

    def decode(self, hidden: torch.Tensor, state: Any) -> torch.Tensor:
        """hidden [N, D], normalised -> prediction [N, C] float32."""
        return self.output(hidden).float()

    def macs_per_image(self, grid: Grid) -> tuple[int, int]:
        """Multiply-adds of one forward over one image: of layers whose input needs no gradient, and of all others."""
        patches = grid[0] * grid[1]
        first = patches * num_products(self.input) + num_products(self.timestep.up)
        return first, patches * num_products(self.output) + num_products(self.timestep.out)
