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
