"""Transfusion's U-Net patcher (section 3 and Table 7): down blocks before the transformer, up blocks with skips after it.

Channel and block counts are not published, so they are configuration. Layout here: a 3x3 stem, `num_blocks` residual blocks at the
resolution of the latent, a strided convolution that makes one token of a patch; on the way back the mirror image, every residual block
taking the matching output of the way down. The timestep enters each residual block as a scale and a shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fusiontrain.models.layers.size import num_products
from fusiontrain.models.modalities.image import GridEmbedding, TimestepEmbedding
from fusiontrain.models.modalities.patches import Grid, patch_side, patchify, runs_of_equal_grids, unpatchify

NORM_GROUPS = 8


class ResidualBlock(nn.Module):
    """x [B, in, H, W], t [B, channels] -> [B, channels, H, W]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(NORM_GROUPS, in_channels)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(channels, 2 * channels)
        self.norm_out = nn.GroupNorm(NORM_GROUPS, channels)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.scale_shift(F.silu(t))[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm_out(hidden) * (1 + scale) + shift
        return self.skip(x) + self.conv_out(F.silu(hidden))


@dataclass(frozen=True)
class _Run:
    """What the way up needs of one run of equally sized images: the skips of the way down and the timestep features."""

    grid: Grid
    num_images: int
    skips: tuple[torch.Tensor, ...]
    timestep: torch.Tensor


class UNetPatcher(nn.Module):
    """Same interface as `LinearPatcher`. `channels` is the depth of the maps that patches are cut from."""

    def __init__(self, patch_dim: int, channels: int, dim: int, width: int, num_blocks: int, position_embedding: str) -> None:
        super().__init__()
        self.channels, self.side = channels, patch_side(patch_dim, channels)
        self.timestep = TimestepEmbedding(width)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(width, width) for _ in range(num_blocks))
        self.to_tokens = nn.Conv2d(width, width, self.side, stride=self.side)
        self.input = nn.Linear(width, dim)
        self.position = GridEmbedding(dim) if position_embedding == "sincos2d" else None
        self.from_tokens = nn.Linear(dim, width)
        self.to_maps = nn.ConvTranspose2d(width, width, self.side, stride=self.side)
        self.up = nn.ModuleList(ResidualBlock(2 * width, width) for _ in range(num_blocks + 1))
        self.norm = nn.GroupNorm(NORM_GROUPS, width)
        self.output = nn.Conv2d(width, channels, 3, padding=1)

    def encode(
        self, values: torch.Tensor, levels: torch.Tensor, image_ids: torch.Tensor, grids: tuple[Grid, ...]
    ) -> tuple[torch.Tensor, list[_Run]]:
        timesteps = self.timestep(levels)  # [I, width]
        runs, tokens, first_patch, first_image = [], [], 0, 0
        for grid, count in runs_of_equal_grids(grids) or [((1, 1), 0)]:
            size = grid[0] * grid[1]
            patches = values[first_patch : first_patch + count * size].reshape(count, size, values.shape[-1])
            t = timesteps[first_image : first_image + count]
            skips = self._way_down(unpatchify(patches.to(t.dtype), grid, self.channels), t)
            tokens.append(self.to_tokens(skips[-1]).flatten(2).transpose(1, 2).flatten(0, 1))  # [count * size, width]
            runs.append(_Run(grid, count, skips, t))
            first_patch, first_image = first_patch + count * size, first_image + count
        x = self.input(torch.cat(tokens))
        if self.position is not None:
            x = x + self.position(grids, x.device, x.dtype)
        return x, runs

    def _way_down(self, maps: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        skips = [self.stem(maps)]
        for block in self.down:
            skips.append(block(skips[-1], t))
        return tuple(skips)

    def decode(self, hidden: torch.Tensor, state: list[_Run]) -> torch.Tensor:
        """hidden [N, D], normalised -> prediction [N, C] float32."""
        features = self.from_tokens(hidden)
        outputs, first = [], 0
        for run in state:
            rows, columns = run.grid
            count = run.num_images * rows * columns
            tokens = features[first : first + count].reshape(run.num_images, rows, columns, features.shape[-1]).permute(0, 3, 1, 2)
            maps = self.to_maps(tokens)
            for block, skip in zip(self.up, reversed(run.skips), strict=True):
                maps = block(torch.cat([maps, skip], dim=1), run.timestep)
            maps = self.output(F.silu(self.norm(maps)))
            outputs.append(patchify(maps, self.side).flatten(0, 1))
            first += count
        return torch.cat(outputs).float()

    def macs_per_image(self, grid: Grid) -> tuple[int, int]:
        """Multiply-adds of one forward over one image: of layers whose input needs no gradient, and of all others."""
        patches = grid[0] * grid[1]
        pixels = patches * self.side**2
        blocks = [*self.down, *self.up]
        per_pixel = [self.output, *(conv for block in blocks for conv in (block.conv_in, block.conv_out, block.skip))]
        per_patch = [self.to_tokens, self.input, self.from_tokens, self.to_maps]
        per_image = [self.timestep.out, *(block.scale_shift for block in blocks)]
        first = pixels * num_products(self.stem) + num_products(self.timestep.up)
        counts = ((pixels, per_pixel), (patches, per_patch), (1, per_image))
        return first, sum(count * _weight_sizes(layers) for count, layers in counts)


def _weight_sizes(layers: list[nn.Module]) -> int:
    return sum(num_products(layer) for layer in layers if not isinstance(layer, nn.Identity))
