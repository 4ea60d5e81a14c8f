"""All initialisation, as one table. Every parameter is drawn from a generator keyed by (seed, its name): the same whatever else exists.

| parameter | value |
|---|---|
| norms | weight 1, bias 0 |
| biases | 0 |
| text embedding | normal, std 1 / sqrt(width): logits start at a standard deviation of one where the head shares it |
| image output (linear or convolution) | 0: the first prediction is "nothing" |
| o and down projections | normal, std 1 / sqrt(fan-in) / sqrt(2 * layers): the residual stream starts at the embedding's scale |
| every other matrix or convolution | normal, std 1 / sqrt(fan-in) |
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn

from fusiontrain.models.plan import ReadRows
from fusiontrain.utils.keyed import hash_key

RESIDUAL_OUTPUTS = (".attention.o.", ".feed_forward.down.")


def random_weights(seed: int, num_layers: int) -> ReadRows:
    """The table above as a source of rows. Drawn rows take the memory of their whole parameter for a moment: the generator counts from its start."""

    def read_rows(name: str, shape: torch.Size, first: int, last: int) -> torch.Tensor:
        std = _std(name, shape, num_layers)
        if std is None:
            return torch.full((last - first, *shape[1:]), 1.0 if name.endswith("weight") else 0.0)
        if std == 0.0 or first == last:
            return torch.zeros(last - first, *shape[1:])
        generator = torch.Generator().manual_seed(hash_key(seed, zlib.crc32(name.encode())))
        return torch.randn(shape, generator=generator)[first:last] * std

    return read_rows


@torch.no_grad()
def fill(model: nn.Module, read_rows: ReadRows) -> None:
    """Give every parameter of a model in one process its first value, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(read_rows(name, parameter.shape, 0, len(parameter)))


def _std(name: str, shape: torch.Size, num_layers: int) -> float | None:
    """Standard deviation of a parameter; 0 for zeros; None for norms (ones, or zeros for their biases)."""
    if len(shape) == 1:
        return 0.0 if name.endswith("bias") else None
    if name.startswith("image.output."):
        return 0.0
    fan_in = shape[1:].numel()
    scale = 1 / math.sqrt(2 * num_layers) if any(part in name for part in RESIDUAL_OUTPUTS) else 1.0
    return scale / math.sqrt(fan_in)
