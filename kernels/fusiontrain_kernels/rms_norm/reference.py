"""The specification of rms_norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusiontrain_kernels._segments import by_owner, check_bounds, join, segments


def rms_norm(
    operator: str, x: torch.Tensor, weights: Sequence[torch.Tensor], bounds: tuple[int, ...], eps: float, offsets: torch.Tensor | None
) -> torch.Tensor:
    """See the package. Rows are normed all together; only the weight is per modality. operator: whose name an error gives."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    if offsets is not None and torch.compiler.is_compiling():
        return by_owner([weight * normed for weight in weights], offsets)
    check_bounds(operator, bounds, len(weights), len(x))
    return join([weights[m] * rows for m, rows in enumerate(segments(normed, bounds))])
