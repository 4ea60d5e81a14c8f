"""A frozen autoencoder between pixels and latents (LMFusion and Transfusion train on 32 x 32 latents of 256 x 256 images)."""

from __future__ import annotations

from pathlib import Path

import torch

from fusiontrain.models.modalities.patches import Grid, patch_side, patchify, runs_of_equal_grids, unpatchify
from fusiontrain.utils.errors import UserError

PIXEL_CHANNELS = 3


class LatentCodec:
    """Wraps a diffusers `AutoencoderKL` folder. It is not a submodule: its weights are neither trained, sharded nor saved.

    Latents are (mean - shift) * scale with the constants of the folder's config, so that they have about unit variance. The mean of the
    posterior is used, not a sample: what an image looks like must not depend on a random state.
    """

    def __init__(self, path: str) -> None:
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"model.image.vae={path}: not a diffusers AutoencoderKL folder (no config.json in it)")
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise UserError("model.image.vae needs the diffusers package: pip install 'fusiontrain[vae]'") from error
        try:
            self.vae = AutoencoderKL.from_pretrained(path, local_files_only=True).eval().requires_grad_(False)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"model.image.vae={path}: cannot be loaded as an AutoencoderKL: {error}") from error
        self.channels: int = self.vae.config.latent_channels
        self.downsampling: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scale: float = self.vae.config.scaling_factor or 1.0
        self.shift: float = self.vae.config.shift_factor or 0.0

    def latent_patch_dim(self, pixel_patch_dim: int) -> int:
        """Numbers of a latent patch that covers the same pixels. Raises UserError where the sides do not divide."""
        side = patch_side(pixel_patch_dim, PIXEL_CHANNELS)
        if side % self.downsampling:
            raise UserError(f"data.image.patch_size={side}: must be a multiple of the VAE's downsampling factor {self.downsampling}")
        return self.channels * (side // self.downsampling) ** 2

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, grids: tuple[Grid, ...]) -> torch.Tensor:
        """Pixel patches [N, 3 * p * p] in [-1, 1] -> latent patches [N, channels * q * q] float32, q = p / downsampling."""
        side = patch_side(pixels.shape[-1], PIXEL_CHANNELS) // self.downsampling
        self.vae.to(pixels.device)
        patches, first = [], 0
        for grid, count in runs_of_equal_grids(grids):
            size = count * grid[0] * grid[1]
            maps = unpatchify(pixels[first : first + size].reshape(count, -1, pixels.shape[-1]), grid, PIXEL_CHANNELS)
            mean = self.vae.encode(maps.to(self.vae.dtype)).latent_dist.mean.float()
            patches.append(patchify((mean - self.shift) * self.scale, side).flatten(0, 1))
            first += size
        return torch.cat(patches) if patches else pixels.new_zeros(0, self.channels * side * side)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latent maps [B, channels, h, w] -> pixels [B, 3, H, W] in [-1, 1] float32."""
        self.vae.to(latents.device)
        return self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample.float().clamp(-1, 1)
