"""Normal noise that is a function of a key: no generator, no state, the same on every device count and after every resume."""

from __future__ import annotations

import math

import torch

from fusiontrain.utils.keyed import GOLDEN_GAMMA, MULTIPLIERS, SHIFTS


def keyed_normal(noise_keys: torch.Tensor, image_ids: torch.Tensor, num_channels: int, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Standard normal numbers for the tokens of I images, [N, C] float32 on the device of the keys.

    Number j of an image (j = patch in raster order * C + channel) depends on (its key, j) alone, whatever lies beside it in the batch.
    noise_keys [I] int64; image_ids [N] int64, which image a token belongs to, the tokens of an image being neighbours in images' order;
    grids: (rows, columns) of the I images, on the host. Raises ValueError when the three do not agree.
    """
    num_tokens = sum(rows * columns for rows, columns in grids)
    if len(grids) != len(noise_keys) or num_tokens != len(image_ids):
        raise ValueError(
            f"keyed_normal: {len(noise_keys)} keys and {len(image_ids)} tokens for {len(grids)} grids of {num_tokens} patches: must agree"
        )
    places = _places_in_image(image_ids, len(noise_keys))  # [N]
    channels = torch.arange(num_channels, device=image_ids.device)
    counters = places[:, None] * num_channels + channels  # [N, C]
    streams = mix_bits(noise_keys)[image_ids]  # mixed first, so that neighbouring keys do not give shifted copies of one stream
    return _normal(mix_bits(streams[:, None] + counters * wrapped(GOLDEN_GAMMA)))


def _places_in_image(image_ids: torch.Tensor, num_images: int) -> torch.Tensor:
    """Number of each token inside its image, [N]; counted on the device, where copying host numbers would wait for it."""
    counts = image_ids.new_zeros(num_images).index_add_(0, image_ids, torch.ones_like(image_ids))
    starts = counts.cumsum(0) - counts
    return torch.arange(len(image_ids), device=image_ids.device) - starts[image_ids]


def _normal(bits: torch.Tensor) -> torch.Tensor:
    """64 random bits -> one normal float32: Box and Muller (1958) on the upper and the lower 32 bits.

    In float64: logarithm and cosine may differ in their last bit between a vector unit and its remainder loop, and rounding to float32
    hides that. Largest magnitude: sqrt(2 ln 2^33) = 6.76.
    """
    radius_draw = (_shift_right(bits, 32).double() + 0.5) * 2.0**-32
    angle_draw = (bits & 0xFFFFFFFF).double() * 2.0**-32
    return (torch.sqrt(-2 * torch.log(radius_draw)) * torch.cos(2 * math.pi * angle_draw)).float()


def mix_bits(bits: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer on int64, whose products wrap as those of uint64 do."""
    bits = bits + wrapped(GOLDEN_GAMMA)
    bits = (bits ^ _shift_right(bits, SHIFTS[0])) * wrapped(MULTIPLIERS[0])
    bits = (bits ^ _shift_right(bits, SHIFTS[1])) * wrapped(MULTIPLIERS[1])
    return bits ^ _shift_right(bits, SHIFTS[2])


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift; `>>` on int64 would repeat the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def wrapped(value: int) -> int:
    """The int64 with the lowest 64 bits of a value, as int64 products wrap."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
