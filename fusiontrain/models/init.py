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

from fusiontrain.utils.keyed import hash_key

RESIDUAL_OUTPUTS = (".attention.o.", ".feed_forward.down.")


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, num_layers: int) -> None:
    """Fill every parameter of `model` in place, as the table above says."""
    for name, parameter in model.named_parameters():
        std = _std(name, parameter, num_layers)
        if std is None:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif std == 0.0:
            parameter.zero_()
        else:
            generator = torch.Generator().manual_seed(hash_key(seed, zlib.crc32(name.encode())))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _std(name: str, parameter: torch.Tensor, num_layers: int) -> float | None:
    """Standard deviation of a parameter; 0 for zeros; None for norms (ones, or zeros for their biases)."""
    if parameter.ndim == 1:
        return 0.0 if name.endswith("bias") else None
    if name.startswith("image.output."):
        return 0.0
    fan_in = parameter[0].numel()
    scale = 1 / math.sqrt(2 * num_layers) if any(part in name for part in RESIDUAL_OUTPUTS) else 1.0
    return scale / math.sqrt(fan_in)
