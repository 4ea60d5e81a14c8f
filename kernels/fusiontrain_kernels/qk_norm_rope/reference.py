"""The specification of qk_norm_rope."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusiontrain_kernels.rms_norm.reference import rms_norm


def norm_rope(
    operator: str,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor] | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bounds: tuple[int, ...],
    eps: float,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    """One of the two tensors, x [T, H, Dh]; see the package. operator: whose name an error gives."""
    if weights:
        x = rms_norm(operator, x, weights, bounds, eps, offsets)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
