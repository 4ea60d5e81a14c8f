"""Weights that exist once per group of modalities, applied to contiguous rows of a modality-major tensor."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional

from fusiontrain.models.layers.layout import Layout
from fusiontrain.models.recipes.recipe import Groups
from fusiontrain_kernels.modality_gemm import modality_gemm
from fusiontrain_kernels.rms_norm import add_rms_norm, rms_norm


def group_names(groups: Groups) -> tuple[str, ...]:
    """The group of each run of rows: neighbouring modalities of one group are one run."""
    return tuple(name for i, name in enumerate(groups) if i == 0 or groups[i - 1] != name)


class UntiedLinear(nn.ModuleDict):
    """One `nn.Linear` without bias per group. x [T, in] -> [T, out]; parameters are named `<group>.weight`."""

    def __init__(self, groups: Groups, in_features: int, out_features: int) -> None:
        super().__init__({name: nn.Linear(in_features, out_features, bias=False) for name in group_names(groups)})
        self.groups = groups

    @property
    def weights(self) -> list[torch.Tensor]:
        """One [out, in] per run of rows; modalities that share one need not be neighbours."""
        return [self[name].weight for name in group_names(self.groups)]

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
        """One [D] per run of rows."""
        return [self[name].weight for name in group_names(self.groups)]

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        rows = layout.rows[self.groups]
        return rms_norm(x, self.weights, rows.bounds, self.eps, offsets=rows.offsets, impl=layout.kernels.norm)

    def add(self, x: torch.Tensor, update: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + update, x + update), both [T, D]."""
        rows = layout.rows[self.groups]
        return add_rms_norm(x, update, self.weights, rows.bounds, self.eps, offsets=rows.offsets, impl=layout.kernels.norm)


class HeadLayerNorm(nn.Module):
    """The weight and bias of H layer norms over Dh numbers, each [H * Dh], so that they count as norms where parameters are told apart by dims."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim))


class UntiedHeadLayerNorm(nn.ModuleDict):
    """A layer norm of every head with a weight and bias of its own, per group (Chameleon, arXiv 2405.09818). x [T, H, Dh] -> [T, H, Dh]."""

    def __init__(self, groups: Groups, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__({name: HeadLayerNorm(num_heads, head_dim) for name in group_names(groups)})
        self.groups, self.eps = groups, eps

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        normed = functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        names, bounds = group_names(self.groups), layout.rows[self.groups].bounds
        rows = [normed[low:high] for low, high in itertools.pairwise(bounds)] if len(names) > 1 else [normed]
        scaled = [part * self[name].weight.view(x.shape[1:]) + self[name].bias.view(x.shape[1:]) for name, part in zip(names, rows, strict=True)]
        return torch.cat(scaled) if len(names) > 1 else scaled[0]
