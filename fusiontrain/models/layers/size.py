"""What a layer computes, told by its sizes: an engine may hold its weights in pieces, or not at all for now."""

from __future__ import annotations

import math

from torch import nn


def num_products(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> int:
    """Multiply-adds for one row, or for one place of a convolution: as many as the layer has weights."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return layer.in_channels * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
