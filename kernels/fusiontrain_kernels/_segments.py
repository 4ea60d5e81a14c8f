"""Contiguous row segments: what every per-modality operator has in common."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


def check_bounds(operator: str, bounds: tuple[int, ...], num_weights: int, num_rows: int) -> None:
    """Raises ValueError unless `bounds` cuts `num_rows` rows into `num_weights` segments."""
    ordered = all(low <= high for low, high in itertools.pairwise(bounds))
    if len(bounds) != num_weights + 1 or not ordered or bounds[0] != 0 or bounds[-1] != num_rows:
        raise ValueError(f"{operator}: bounds={bounds}: must rise from 0 to the {num_rows} rows of x in {num_weights} segments")


def check_like(operator: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor, like: str = "x") -> None:
    """Raises ValueError unless `tensor` has this shape, and x's dtype and device. A kernel would read beside one that has not. like: x's name."""
    if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        wanted, found = f"{x.dtype} {list(shape)} on {x.device}", f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{operator}: {name}: must be {wanted} like {like}, not {found}: convert it")


def check_weights(operator: str, name: str, weights: Sequence[torch.Tensor | None], shape: tuple[int, ...], x: torch.Tensor) -> None:
    """`check_like` for the tensor of every modality that has one."""
    for m, weight in enumerate(weights):
        if weight is not None:
            check_like(operator, f"{name}[{m}]", weight, shape, x)


def segments(x: torch.Tensor, bounds: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """The rows of each segment. One split, since slices would each fill a whole gradient of x with zeros in the backward."""
    return x.split([high - low for low, high in itertools.pairwise(bounds)])


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Segments one behind the other. Empty ones take part, which is what makes their weights' gradients zero and not None."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_owner(parts: Sequence[torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
    """Of every modality's `parts[m]` [T, ...] the rows that are its own: what a traced reference does in place of `segments`, because then its
    graph holds for any borders. Each part is computed for all rows."""
    rows = torch.arange(len(parts[0]), device=offsets.device).view(-1, *[1] * (parts[0].dim() - 1))
    out = parts[0]
    for m in range(1, len(parts)):
        out = torch.where(rows >= offsets[m], parts[m], out)
    return out


def scatter_live(values: Sequence[torch.Tensor], live: Sequence[bool]) -> list[torch.Tensor | None]:
    """One entry a modality: the next of the values where it is live, else None."""
    remaining = iter(values)
    return [next(remaining) if alive else None for alive in live]


def without_none(biases: Sequence[torch.Tensor | None] | None, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One bias a modality, zeros where there is None, or no biases at all: what an operator can be given."""
    return [] if biases is None else [weights[0].new_zeros(len(weights[0])) if bias is None else bias for bias in biases]
