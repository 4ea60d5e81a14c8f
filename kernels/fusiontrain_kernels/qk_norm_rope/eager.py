"""Norm and rotary positions without copies of swapped halves, each with a backward of its own. PyTorch alone, any device.

Under torch.compile it is the reference, which a compiler fuses better than anyone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusiontrain_kernels.qk_norm_rope import reference
from fusiontrain_kernels.rms_norm import eager


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
    """One of the two tensors, x [T, H, Dh]; see the package; the bits are those of the reference. operator: whose name an error gives."""
    if torch.compiler.is_compiling():
        return reference.norm_rope(operator, x, weights, cos, sin, bounds, eps, offsets)
    if weights:
        x = eager.rms_norm(operator, x, weights, bounds, eps, offsets)
    return _Turn.apply(x, cos, sin)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, H, Dh] -> [T, H, Dh]: (a cos - b sin, b cos + a sin) of the halves a and b of a head."""
    out, crossed, half = x * cos[:, None], x * sin[:, None], x.shape[-1] // 2
    out[..., :half] -= crossed[..., half:]
    out[..., half:] += crossed[..., :half]
    return out
