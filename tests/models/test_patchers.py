"""The patchers against loops written from their definitions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fusiontrain.models.modalities.image import LinearPatcher
from fusiontrain.models.modalities.unet import UNetPatcher

CHANNELS, DIM, WIDTH = 2, 12, 16
GRIDS = ((2, 1), (2, 1), (1, 3))
LEVELS = (0.1, 0.7, 1.0)


def woken(patcher: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight away from ones and zeros; returns them in float64."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in patcher.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return {name: value.detach().double() for name, value in patcher.state_dict().items()}


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def timestep(weights: dict[str, torch.Tensor], level: float) -> torch.Tensor:
    angles = [1000 * level * 10_000 ** (-i / 128) for i in range(128)]
    features = torch.tensor([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles], dtype=torch.float64)
    hidden = silu(weights["timestep.up.weight"] @ features + weights["timestep.up.bias"])
    return weights["timestep.out.weight"] @ hidden + weights["timestep.out.bias"]


def norm(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Eight groups of channels, each over all its numbers."""
    out = torch.empty_like(x)
    size = len(x) // 8
    for group in range(8):
        part = x[group * size : (group + 1) * size]
        out[group * size : (group + 1) * size] = (part - part.mean()) / torch.sqrt(((part - part.mean()) ** 2).mean() + 1e-5)
    return out * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def conv(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """A convolution that keeps the size, pixel by pixel."""
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    _, height, width = x.shape
    reach = weight.shape[-1] // 2
    out = torch.empty(len(weight), height, width, dtype=x.dtype)
    for row in range(height):
        for column in range(width):
            total = bias.clone()
            for i in range(-reach, reach + 1):
                for j in range(-reach, reach + 1):
                    if 0 <= row + i < height and 0 <= column + j < width:
                        total += weight[:, :, i + reach, j + reach] @ x[:, row + i, column + j]
            out[:, row, column] = total
    return out


def residual(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    hidden = conv(weights, f"{name}.conv_in", silu(norm(weights, f"{name}.norm_in", x)))
    moved = weights[f"{name}.scale_shift.weight"] @ silu(t) + weights[f"{name}.scale_shift.bias"]
    scale, shift = moved[: len(hidden), None, None], moved[len(hidden) :, None, None]
    hidden = norm(weights, f"{name}.norm_out", hidden) * (1 + scale) + shift
    skip = conv(weights, f"{name}.skip", x) if f"{name}.skip.weight" in weights else x
    return skip + conv(weights, f"{name}.conv_out", silu(hidden))


def map_of(patches: torch.Tensor, grid: tuple[int, int], side: int, channels: int) -> torch.Tensor:
    maps = torch.empty(channels, grid[0] * side, grid[1] * side, dtype=patches.dtype)
    for place, patch in enumerate(patches):
        row, column = place // grid[1] * side, place % grid[1] * side
        maps[:, row : row + side, column : column + side] = patch.reshape(channels, side, side)
    return maps


def unet(weights: dict[str, torch.Tensor], patches: torch.Tensor, level: float, grid: tuple[int, int], side: int, blocks: int, hidden: torch.Tensor):
    """One image: (its tokens [N, D], the prediction [N, C] from `hidden` [N, D])."""
    t, tokens, outputs = timestep(weights, level), [], []
    skips = [conv(weights, "stem", map_of(patches, grid, side, CHANNELS))]
    for block in range(blocks):
        skips.append(residual(weights, f"down.{block}", skips[-1], t))
    places = [(place // grid[1] * side, place % grid[1] * side) for place in range(len(patches))]
    up = torch.empty_like(skips[-1])
    for (row, column), state in zip(places, hidden, strict=True):
        token = weights["to_tokens.bias"].clone()
        features = weights["from_tokens.weight"] @ state + weights["from_tokens.bias"]
        for i in range(side):
            for j in range(side):
                token += weights["to_tokens.weight"][:, :, i, j] @ skips[-1][:, row + i, column + j]
                up[:, row + i, column + j] = weights["to_maps.weight"][:, :, i, j].T @ features + weights["to_maps.bias"]
        tokens.append(weights["input.weight"] @ token + weights["input.bias"])
    for block, skip in enumerate(reversed(skips)):
        up = residual(weights, f"up.{block}", torch.cat([up, skip]), t)
    out = conv(weights, "output", silu(norm(weights, "norm", up)))
    for row, column in places:
        outputs.append(out[:, row : row + side, column : column + side].flatten())
    return torch.stack(tokens), torch.stack(outputs)


def cases(side: int) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """(values [N, C], hidden [N, D], the rows of each image)."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([rows * columns for rows, columns in GRIDS]).cumsum(0).tolist()
    rows = [slice(end - grid[0] * grid[1], end) for end, grid in zip(ends, GRIDS, strict=True)]
    return torch.randn(ends[-1], CHANNELS * side**2, generator=generator), torch.randn(ends[-1], DIM, generator=generator), rows


@pytest.mark.parametrize(("side", "blocks"), [(1, 1), (2, 2), (4, 1)])
def test_unet_equals_the_loops(side: int, blocks: int) -> None:
    patcher = UNetPatcher(CHANNELS * side**2, CHANNELS, DIM, WIDTH, blocks, "none")
    weights = woken(patcher)
    values, hidden, rows = cases(side)
    image_ids = torch.repeat_interleave(torch.tensor([part.stop - part.start for part in rows]))
    tokens, state = patcher.encode(values, torch.tensor(LEVELS), image_ids, GRIDS)
    prediction = patcher.decode(hidden, state)
    for part, level, grid in zip(rows, LEVELS, GRIDS, strict=True):
        expected = unet(weights, values[part].double(), level, grid, side, blocks, hidden[part].double())
        for found, wanted in zip((tokens[part], prediction[part]), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


def test_linear_patcher_equals_the_loops() -> None:
    patcher = LinearPatcher(CHANNELS * 4, DIM, "none")
    weights = woken(patcher)
    values, hidden, rows = cases(2)
    image_ids = torch.repeat_interleave(torch.tensor([part.stop - part.start for part in rows]))
    tokens, state = patcher.encode(values, torch.tensor(LEVELS), image_ids, GRIDS)
    prediction = patcher.decode(hidden, state)
    for image, part in enumerate(rows):
        for row in range(part.start, part.stop):
            wanted = weights["input.weight"] @ values[row].double() + weights["input.bias"] + timestep(weights, LEVELS[image])
            torch.testing.assert_close(tokens[row].double(), wanted, rtol=1e-4, atol=1e-3)
            wanted = weights["output.weight"] @ hidden[row].double() + weights["output.bias"]
            torch.testing.assert_close(prediction[row].double(), wanted, rtol=1e-4, atol=1e-4)
