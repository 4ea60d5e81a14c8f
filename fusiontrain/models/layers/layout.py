"""What the layers are told about the rows they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fusiontrain.models.kernels import Kernels
from fusiontrain.models.recipes.recipe import Groups


@dataclass(frozen=True)
class Rows:
    """Which rows take which of M weights: M + 1 borders, as host numbers and as `offsets` [M + 1] int32 on the rows' device."""

    bounds: tuple[int, ...]
    offsets: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """The borders of every grouping of modalities that a model has, rotary angles [T, Dh], and the kernels to use."""

    rows: Mapping[Groups, Rows]
    cos: torch.Tensor
    sin: torch.Tensor
    kernels: Kernels


def group_rows(groupings: Iterable[Groups], modality_bounds: tuple[int, ...], modality_offsets: torch.Tensor) -> dict[Groups, Rows]:
    """The rows of each grouping: the borders of modalities with those inside a group taken out."""
    return {groups: _rows(groups, modality_bounds, modality_offsets) for groups in set(groupings)}


def _rows(groups: Groups, bounds: tuple[int, ...], offsets: torch.Tensor) -> Rows:
    kept = [i for i in range(len(bounds)) if i in (0, len(groups)) or groups[i] != groups[i - 1]]
    if len(kept) == len(bounds):
        return Rows(bounds, offsets)
    return Rows(tuple(bounds[i] for i in kept), torch.stack([offsets[i] for i in kept]))
