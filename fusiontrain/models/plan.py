"""What a model declares about itself, as plain data, for `parallel/` to interpret."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

ReadRows = Callable[[str, torch.Size, int, int], torch.Tensor]
"""(name, shape, first, last) -> rows first to last of the parameter of that name and whole shape: [last - first, ...] on the CPU, any float dtype.

The values that a model starts from, asked for shard by shard, so that nobody holds all of them."""


@dataclass(frozen=True)
class ModelPlan:
    """How a model wants to be spread and frozen.

    shard_units: names of the modules that are gathered and freed as one, in forward order.
    recompute: names of the modules whose activations may be recomputed in the backward.
    frozen: names of the parameters that never change.
    forward_methods: methods besides `forward` that run the shard units (an engine must gather weights for them too).
    """

    shard_units: tuple[str, ...]
    recompute: tuple[str, ...]
    frozen: tuple[str, ...]
    forward_methods: tuple[str, ...]
