"""Denoising from pure noise to a clean image, with classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

The prediction that the sampler follows is `without + scale * (with - without)`: what the model says knowing the text, pushed away
from what it says knowing nothing. Scale 1 is the plain prediction, and then the second half is not computed. It is linear, so it
is the same guidance whether the model predicts the noise or the velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from fusiontrain.generate.samplers import choose_step
from fusiontrain.objectives.gaussian_path import GaussianPath
from fusiontrain.objectives.noise import keyed_normal
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import hash_key

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [B, N, C], levels [B]) -> prediction [B, N, C]."""

Grid = tuple[int, int]

STARTING_NOISE = 0  # the draw number of the noise that an image starts from; step i adds draw 1 + i


def guide(with_text: torch.Tensor, without_text: torch.Tensor, scale: float) -> torch.Tensor:
    """`without + scale * (with - without)`, any shape, in float32."""
    without_text = without_text.float()
    return without_text + scale * (with_text.float() - without_text)


def image_noise(keys: Sequence[int], draw: int, num_channels: int, grid: Grid, device: torch.device) -> torch.Tensor:
    """Standard normal noise of B images, [B, N, C] float32: a function of each image's key and the draw's number alone.

    So a picture does not depend on which others are painted beside it, nor on global random state.
    """
    num_patches = grid[0] * grid[1]
    noise_keys = torch.tensor([hash_key(key, draw) for key in keys], dtype=torch.int64, device=device)
    image_ids = torch.arange(len(keys), device=device).repeat_interleave(num_patches)
    return keyed_normal(noise_keys, image_ids, num_channels, (grid,) * len(keys)).view(len(keys), num_patches, num_channels)


def denoise(
    predict: Predict,
    path: GaussianPath,
    keys: Sequence[int],
    num_channels: int,
    grid: Grid,
    steps: int,
    device: torch.device,
    *,
    sampler: str = "auto",
    eta: float = 0.0,
    clip: float | None = None,
) -> torch.Tensor:
    """Clean images [B, N, C] float32, from noise that is keyed by `keys` (one per image), in `steps` steps of a sampler of samplers.py.

    Each step overwrites the noised image, as Transfusion (section 3) samples: nothing of the earlier ones stays in the context.
    eta: of ddim. clip: largest magnitude of a clean value, where there is one (1 for pixels). Raises UserError for a number of steps that the
    path does not have, and for a sampler that there is not.
    """
    step = choose_step(sampler, path)
    try:
        levels = path.sampling_levels(steps).to(device)
    except ValueError as error:
        raise UserError(f"denoising {error}") from error

    def look(x: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clean, noise = path.estimates(x, predict(x.float(), level.expand(len(keys))).float(), level)
        if clip is None:
            return clean, noise
        a, s = path.beside(level, x)
        clean = clean.clamp(-clip, clip)
        return clean, (x - a * clean) / s

    x = image_noise(keys, STARTING_NOISE, num_channels, grid, device)
    for index in range(steps):
        draw = partial(image_noise, keys, 1 + index, num_channels, grid, device)
        x = step(path, look, x, levels[index], levels[index + 1], draw, eta).float()
    return x
