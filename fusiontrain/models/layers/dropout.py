"""Dropout whose mask is a function of a key per row: the same after every resume, on any number of ranks, and in a recomputed forward."""

from __future__ import annotations

import torch

from fusiontrain.objectives.noise import mix_bits, wrapped

LEVELS = 1 << 16
"""A share is rounded to whole steps of 2^-16, so that 64 random bits serve four features."""

PLACE_STRIDE, FEATURE_STRIDE = 0x2545F4914F6CDD1D, 0x632BE59BD9B4E019  # odd and far apart, so that keys of neighbours do not meet


def keyed_dropout(x: torch.Tensor, row_keys: torch.Tensor, place: int, share: float) -> torch.Tensor:
    """Set about `share` of the numbers of x [T, D] to 0 and scale the others, so that the mean stays.

    What is dropped of a row depends on (its key, place, feature) alone. row_keys [T] int64; place: tells the dropouts of a model apart.
    """
    threshold = round(share * LEVELS)
    streams = mix_bits(mix_bits(row_keys) + wrapped(place * PLACE_STRIDE))  # [T]
    features = torch.arange((x.shape[1] + 3) // 4, device=x.device)
    draws = mix_bits(streams[:, None] + features * FEATURE_STRIDE).view(torch.int16)[:, : x.shape[1]]  # [T, D], -2^15 to 2^15 - 1
    kept = draws >= threshold - LEVELS // 2
    return x * (kept * (LEVELS / (LEVELS - threshold))).to(x.dtype)
