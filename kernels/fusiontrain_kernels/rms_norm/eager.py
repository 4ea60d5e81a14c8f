"""RMS norm with a backward of its own: a third of the passes over memory of the reference's, and no row kept but x. PyTorch alone, any device.

Under torch.compile it is the reference, which a compiler fuses better than anyone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from fusiontrain_kernels._segments import check_bounds
from fusiontrain_kernels.rms_norm import reference


def rms_norm(
    operator: str, x: torch.Tensor, weights: Sequence[torch.Tensor], bounds: tuple[int, ...], eps: float, offsets: torch.Tensor | None
) -> torch.Tensor:
    """See the package; the bits are those of the reference. x [T, ..., D]. operator: whose name an error gives."""
    if torch.compiler.is_compiling():
        return reference.rms_norm(operator, x, weights, bounds, eps, offsets)
    check_bounds(operator, bounds, len(weights), len(x))
    return _RMSNorm.apply(x, bounds, eps, *weights)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bounds: tuple[int, ...], eps: float, *weights: torch.Tensor) -> torch.Tensor:
        wide = _wide(x)
        scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, *weights)
        ctx.bounds = bounds
        out = (wide * scale).to(x.dtype).to(torch.promote_types(x.dtype, weights[0].dtype))
        for weight, (low, high) in zip(weights, itertools.pairwise(bounds), strict=True):
            out[low:high].mul_(weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With y = x * scale: dw = sum of grad * y, and dx = scale * (grad * w - y * mean(grad * w * y))."""
        x, scale, *weights = ctx.saved_tensors
        rows, (x_live, _, _, *live) = list(itertools.pairwise(ctx.bounds)), ctx.needs_input_grad
        normed, grad = _wide(x) * scale, _wide(grad)
        weight_grads: list[torch.Tensor | None] = [None] * len(weights)
        if any(live):
            product = grad * normed.to(x.dtype)  # what the weight was multiplied with
            sums = [_sum_of_rows(product[low:high], weight) for weight, (low, high) in zip(weights, rows, strict=True)]
            weight_grads = [total if needed else None for total, needed in zip(sums, live, strict=True)]
        if not x_live:
            return None, None, None, *weight_grads
        x_grad = torch.empty_like(normed)
        for weight, (low, high) in zip(weights, rows, strict=True):
            torch.mul(grad[low:high], weight.to(grad.dtype), out=x_grad[low:high])
        mean = (x_grad * normed).mean(-1, keepdim=True)
        return x_grad.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), None, None, *weight_grads


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum_of_rows(product: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return product.flatten(0, -2).sum(0).to(weight.dtype)
