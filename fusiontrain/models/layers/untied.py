"""Weights that exist once per group of modalities, applied to contiguous rows of a modality-major tensor."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.models.layers.layout import Layout
from fusiontrain.models.recipes.recipe import Groups
from fusiontrain_kernels.modality_gemm import modality_gemm
from fusiontrain_kernels.rms_norm import add_rms_norm, rms_norm


def group_names(groups: Groups) -> tuple[str, ...]:
    """The distinct groups in order. Neighbouring modalities may share one; a group that comes back later is refused."""
    names = tuple(name for i, name in enumerate(groups) if i == 0 or groups[i - 1] != name)
    assert len(set(names)) == len(names), f"modalities of one group must be neighbours: {groups}"
    return names


class UntiedLinear(nn.ModuleDict):
    """One `nn.Linear` without bias per group. x [T, in] -> [T, out]; parameters are named `<group>.weight`."""

    def __init__(self, groups: Groups, in_features: int, out_features: int) -> None:
        super().__init__({name: nn.Linear(in_features, out_features, bias=False) for name in group_names(groups)})
        self.groups = groups

    @property
    def weights(self) -> list[torch.Tensor]:
        """One [out, in] per group."""
        return [linear.weight for linear in self.values()]

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        rows, impl = layout.rows[self.groups], layout.kernels.gemm
        return modality_gemm(x, self.weights, rows.bounds, offsets=rows.host_offsets if impl == "segments" else rows.offsets, impl=impl)


class UntiedRMSNorm(nn.ModuleDict):
    """One RMS norm weight per group. x [T, D] -> [T, D]."""

    def __init__(self, groups: Groups, dim: int, eps: float) -> None:
        super().__init__({name: nn.RMSNorm(dim, eps=eps) for name in group_names(groups)})
        self.groups, self.eps = groups, eps

    @property
    def weights(self) -> list[torch.Tensor]:
        """One [D] per group."""
        return [norm.weight for norm in self.values()]

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        rows = layout.rows[self.groups]
        return rms_norm(x, self.weights, rows.bounds, self.eps, offsets=rows.offsets, impl=layout.kernels.norm)

    def add(self, x: torch.Tensor, update: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + update, x + update), both [T, D]."""
        rows = layout.rows[self.groups]
        return add_rms_norm(x, update, self.weights, rows.bounds, self.eps, offsets=rows.offsets, impl=layout.kernels.norm)
