"""One matrix product per modality, over rows that lie modality by modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels.modality_gemm import reference

_IMPLEMENTATIONS = {"reference": reference.modality_gemm}


def modality_gemm(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bounds: tuple[int, ...],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """`out[r] = x[r] @ weights[m].T + biases[m]` where row r lies in `bounds[m] <= r < bounds[m + 1]`.

    x [T, Kin]; weights: M tensors [N, Kin]; bounds: M + 1 host numbers from 0 to T, never decreasing; biases: M tensors [N] or None.
    Returns [T, N]. A modality without rows gets a zero gradient, not None. impl: auto, reference.
    Raises ValueError for an unknown impl and for bounds that do not fit.
    """
    return choose("modality_gemm", _IMPLEMENTATIONS, impl, auto="reference")(x, weights, bounds, biases)
