"""The specification of rms_norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusiontrain_kernels._segments import check_bounds, join, segments


def rms_norm(x: torch.Tensor, weights: Sequence[torch.Tensor], bounds: tuple[int, ...], eps: float) -> torch.Tensor:
    """See the package. Rows are normed all together; only the weight is per modality."""
    check_bounds("rms_norm", bounds, len(weights), len(x))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return join([weights[m] * rows for m, rows in enumerate(segments(normed, bounds))])
