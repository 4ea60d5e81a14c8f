"""The norm of the gradients, whole and by modality, and clipping: sums over ranks travel with the losses, and the host waits once for both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from fusiontrain.modality import MODALITY_NAMES

SHARED = "shared"
GROUPS = (*MODALITY_NAMES, SHARED)

ParameterGroups = Mapping[str, Sequence[nn.Parameter]]
"""The parameters that train, by the modality whose rows they see alone, or `shared`."""


def modality_groups(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """Those of `parameters` that train, by GROUPS: weights of one modality stand under its name, such as `blocks.0.ffn_norm.image.weight`."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            groups[next((part for part in name.split(".") if part in MODALITY_NAMES), SHARED)].append(parameter)
    return groups


def squared_norms(groups: ParameterGroups, device: torch.device) -> torch.Tensor:
    """This rank's part of the squared norm of each group's gradients, [groups] float64 on `device`: the parts of all ranks add up to it.

    What several ranks hold copies of, each of them counts for its share.
    """
    parts = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for place, parameters in enumerate(groups.values()):
        by_copies: dict[int, list[torch.Tensor]] = {}
        for gradient in _gradients(parameters):
            by_copies.setdefault(_copies(gradient), []).append(_local(gradient))
        for copies, local in by_copies.items():
            norm = torch.nn.utils.get_total_norm(local)
            parts[place] += norm.double().square().to(device) / copies  # offloaded gradients have theirs on the CPU
    return parts


def norms(squares: Sequence[float], groups: ParameterGroups) -> tuple[float, dict[str, float]]:
    """The norm of all gradients and of each group's, from the sums of `squared_norms`; NaN for a group where nothing trains."""
    by_group = {name: math.sqrt(square) if groups[name] else math.nan for name, square in zip(groups, squares, strict=True)}
    return math.sqrt(sum(squares)), by_group


def clip(groups: ParameterGroups, norm: float, clip_norm: float) -> None:
    """Scale the gradients, whose norm is `norm`, down to `clip_norm` where they are larger."""
    factor = clip_norm / (norm + 1e-6)
    if factor < 1:
        torch._foreach_mul_([_local(gradient) for parameters in groups.values() for gradient in _gradients(parameters)], factor)


def _gradients(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _copies(gradient: torch.Tensor) -> int:
    """How many ranks hold the same piece of a gradient."""
    if not isinstance(gradient, DTensor):
        return 1
    sizes = [gradient.device_mesh.size(axis) for axis, placement in enumerate(gradient.placements) if isinstance(placement, Replicate)]
    return math.prod(sizes)
