"""What the layers are told about the rows they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fusiontrain.models.kernels import Kernels
from fusiontrain.models.recipes.recipe import Groups


@dataclass(frozen=True)
class Rows:
    """Which rows take which of M weights: M + 1 borders, as numbers, and as [M + 1] int32 on the rows' device and on the host."""

    bounds: tuple[int, ...]
    offsets: torch.Tensor
    host_offsets: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """The borders of every grouping of modalities that a model has, rotary angles [T, Dh], and the kernels to use.

    row_keys [T] int64: what the dropout of each row is keyed by; None for no dropout.
    """

    rows: Mapping[Groups, Rows]
    cos: torch.Tensor
    sin: torch.Tensor
    kernels: Kernels
    row_keys: torch.Tensor | None = None


def group_rows(groupings: Iterable[Groups], modality_bounds: tuple[int, ...], modality_offsets: torch.Tensor) -> dict[Groups, Rows]:
    """The rows of each grouping: the borders of modalities with those inside a group taken out."""
    return {groups: _rows(groups, modality_bounds, modality_offsets) for groups in set(groupings)}


def _rows(groups: Groups, bounds: tuple[int, ...], offsets: torch.Tensor) -> Rows:
    kept = [i for i in range(len(bounds)) if i in (0, len(groups)) or groups[i] != groups[i - 1]]
    if len(kept) < len(bounds):
        bounds, offsets = tuple(bounds[i] for i in kept), torch.stack([offsets[i] for i in kept])
    return Rows(bounds, offsets, offsets if offsets.is_cpu else torch.tensor(bounds, dtype=torch.int32))
