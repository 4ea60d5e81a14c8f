"""The image policy: how many patches a picture becomes, and how it is brought to that size.

Grids follow from height, width and the config alone, which the index has, so the plan and the decoder agree and one index serves every policy.
"""

from __future__ import annotations

import itertools
import math

from PIL import Image, ImageOps

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import DECODE, BadSample

Grid = tuple[int, int]
"""(rows, columns) of an image in patches."""


def grid_of(height: int, width: int, config: ImageDataConfig) -> Grid:
    """The grid of an image of that size, in pixels, latent cells or codes. Raises BadSample where patches do not divide a latent."""
    if config.representation == "codes":
        return height, width
    if config.representation == "pixels" and config.resize == "native":
        return native_grid(height, width, config)
    if config.representation == "pixels":
        height = width = config.size
    return whole_patches(height, width, config.patch_size)


def whole_patches(height: int, width: int, side: int) -> Grid:
    """The grid of patches that maps of that size are cut into. Raises BadSample where they do not divide it."""
    if height % side or width % side:
        raise BadSample(f"a latent of {height} x {width} cells does not divide into patches of {side}", DECODE)
    return height // side, width // side


def native_grid(height: int, width: int, config: ImageDataConfig) -> Grid:
    """The grid that keeps a picture's shape best, of `min_tokens` to `max_tokens` patches.

    Pictures inside these bounds keep their size up to whole patches, others are scaled into them. The upper bound always holds; the lower one
    gives way where whole patches of about the picture's shape would exceed the upper.
    """
    smallest, largest, side = config.min_tokens, config.max_tokens, config.patch_size
    patches = height * width / side**2
    scale = math.sqrt(min(max(patches, smallest), largest) / patches)  # correctly rounded, so the same on every machine
    rows, columns = height * scale / side, width * scale / side
    near = [(r, c) for r, c in itertools.product(_around(rows), _around(columns)) if r * c <= largest]
    if not near:  # one patch is thicker than the picture
        return (1, largest) if width > height else (largest, 1)
    enough = [grid for grid in near if grid[0] * grid[1] >= smallest]
    return min(enough or near, key=lambda grid: (_distortion(grid, height, width), -grid[0] * grid[1]))


def _around(length: float) -> tuple[int, int]:
    return max(1, math.floor(length)), max(1, math.ceil(length))


def _distortion(grid: Grid, height: int, width: int) -> float:
    """How much one side is stretched more than the other, from 1 on."""
    down, across = grid[0] * width, grid[1] * height
    return max(down, across) / min(down, across)


def resized(image: Image.Image, height: int, width: int, crop: bool) -> Image.Image:
    """The picture at exactly that size by bicubic filtering: its middle in that shape with `crop`, else all of it."""
    if image.size == (width, height):
        return image
    if crop:
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)
