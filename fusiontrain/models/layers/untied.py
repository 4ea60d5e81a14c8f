"""Weights that exist once per group of modalities, applied to contiguous rows of a modality-major tensor."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.models.recipes.recipe import Groups
from fusiontrain_kernels.modality_gemm import modality_gemm
from fusiontrain_kernels.rms_norm import rms_norm


def group_names(groups: Groups) -> tuple[str, ...]:
    """The distinct groups in order. Neighbouring modalities may share one; a group that comes back later is refused."""
    names = tuple(name for i, name in enumerate(groups) if i == 0 or groups[i - 1] != name)
    assert len(set(names)) == len(names), f"modalities of one group must be neighbours: {groups}"
    return names


def group_bounds(groups: Groups, modality_bounds: tuple[int, ...]) -> tuple[int, ...]:
    """First row of each group, and the end: modality bounds with the borders inside a group taken out."""
    inner = [modality_bounds[i] for i in range(1, len(groups)) if groups[i] != groups[i - 1]]
    return (modality_bounds[0], *inner, modality_bounds[-1])


class UntiedLinear(nn.ModuleDict):
    """One `nn.Linear` without bias per group. x [T, in] -> [T, out]; parameters are named `<group>.weight`."""

    def __init__(self, groups: Groups, in_features: int, out_features: int) -> None:
        super().__init__({name: nn.Linear(in_features, out_features, bias=False) for name in group_names(groups)})
        self.groups = groups

    def forward(self, x: torch.Tensor, modality_bounds: tuple[int, ...]) -> torch.Tensor:
        weights = [linear.weight for linear in self.values()]
        return modality_gemm(x, weights, group_bounds(self.groups, modality_bounds))


class UntiedRMSNorm(nn.ModuleDict):
    """One RMS norm weight per group. x [T, D] -> [T, D]."""

    def __init__(self, groups: Groups, dim: int, eps: float) -> None:
        super().__init__({name: nn.RMSNorm(dim, eps=eps) for name in group_names(groups)})
        self.groups, self.eps = groups, eps

    def forward(self, x: torch.Tensor, modality_bounds: tuple[int, ...]) -> torch.Tensor:
        weights = [norm.weight for norm in self.values()]
        return rms_norm(x, weights, group_bounds(self.groups, modality_bounds), self.eps)
