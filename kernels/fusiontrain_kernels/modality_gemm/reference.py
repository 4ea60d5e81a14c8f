"""The specification of modality_gemm: a GEMM per contiguous segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fusiontrain_kernels._segments import by_owner, check_bounds, join, segments


def modality_gemm(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bounds: tuple[int, ...],
    biases: Sequence[torch.Tensor | None] | None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the package. One weight is a plain `F.linear`, so a tied model computes exactly what a dense one does."""
    biases = [None] * len(weights) if biases is None else biases
    if offsets is not None and torch.compiler.is_compiling():
        return by_owner([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], offsets)
    check_bounds("modality_gemm", bounds, len(weights), len(x))
    if len(weights) == 1:
        return F.linear(x, weights[0], biases[0])
    return join([F.linear(rows, weights[m], biases[m]) for m, rows in enumerate(segments(x, bounds))])
