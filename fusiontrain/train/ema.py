"""A moving average of the weights that train, which often paints better pictures than the weights themselves.

It is sharded as the weights are, moves with every update and with nothing else, and is stored in the checkpoint as the group `ema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fusiontrain.config.schema import TrainConfig

GROUP = "ema"
"""Name of the averages among the tensors of a checkpoint, and of the key in its manifest's model section that tells their decay."""


def average_weights(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], decay: float) -> dict[str, torch.Tensor]:
    """Copies, by name, of the parameters that train; from now on each update of `optimizer` moves them by (1 - decay) of their distance to the weights."""
    averages = {name: parameter.detach().clone() for name, parameter in parameters.items() if parameter.requires_grad}
    mine = [_local(average) for average in averages.values()]

    @torch.no_grad()
    def follow(*_: Any) -> None:
        torch._foreach_lerp_(mine, [_local(parameters[name]) for name in averages], 1 - decay)

    optimizer.register_step_post_hook(follow)
    return averages


@torch.no_grad()
def restart(averages: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Set the averages to the weights as they are."""
    for name, average in averages.items():
        average.copy_(parameters[name])


def note(train: TrainConfig) -> dict[str, float]:
    """What a checkpoint's manifest says of the averages: nothing where there are none."""
    return {} if train.ema_decay is None else {GROUP: train.ema_decay}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
