"""Rotary position embedding (arXiv 2104.09864) with the frequencies of a Llama config."""

from __future__ import annotations

import math

import torch
from torch import nn

from fusiontrain.models.shape import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> torch.Tensor:
    """Angles per position, [head_dim / 2] float32."""
    # On the CPU in any case: a model that is declared on the meta device still has its buffers.
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    length = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((length / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


class RotaryEmbedding(nn.Module):
    """position_ids [T] -> (cos, sin), each [T, Dh] in `dtype`, both halves of the head carrying the same angles."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.register_buffer("frequencies", rope_frequencies(head_dim, theta, scaling), persistent=False)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[:, None].float() * self.frequencies[None].float()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
