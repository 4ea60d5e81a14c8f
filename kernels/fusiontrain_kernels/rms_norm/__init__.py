"""RMS norm (Zhang and Sennrich, arXiv 1910.07467) with a weight per modality."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels._launch import auto_triton, device_offsets, require_triton
from fusiontrain_kernels._segments import check_bounds, check_like, check_weights
from fusiontrain_kernels.rms_norm import eager, reference

Weights = Sequence[torch.Tensor]
Bounds = tuple[int, ...]


def rms_norm(
    x: torch.Tensor, weights: Weights, bounds: Bounds, eps: float, *, offsets: torch.Tensor | None = None, impl: str = "auto"
) -> torch.Tensor:
    """`out[r] = weights[m] * x[r] / sqrt(mean(x[r]^2) + eps)` where row r lies in `bounds[m] <= r < bounds[m + 1]`.

    x [T, D]; weights: M tensors [D]; bounds: M + 1 host numbers from 0 to T, never decreasing. Returns [T, D]. The mean is taken in
    float32 at least, and the normed row is rounded to x's dtype before the weight, as Hugging Face's LlamaRMSNorm does.
    offsets [M + 1] int32 on x's device: the same numbers; with them triton, and the others under torch.compile, read no bounds. A modality
    without rows gets a zero gradient, not None. impl: auto (triton on a GPU, else eager), reference, eager (the same bits with fewer passes over
    memory; no second derivative), triton.
    Raises ValueError for an unknown impl, one that cannot run here, bounds that do not fit, and (triton) an x that is not [T, D],
    and weights not of its dtype and width.
    """
    norm = choose("rms_norm", _IMPLEMENTATIONS, impl, auto=auto_triton(x, "eager"))
    return norm("rms_norm", x, None, weights, bounds, eps, offsets)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weights: Weights,
    bounds: Bounds,
    eps: float,
    *,
    offsets: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rms_norm(x + residual), x + residual)` in one pass; both [T, D]. The rest is as for `rms_norm`."""
    norm = choose("add_rms_norm", _IMPLEMENTATIONS, impl, auto=auto_triton(x, "eager"))
    return norm("add_rms_norm", x, residual, weights, bounds, eps, offsets)


def _in_torch(norm: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def run(
        operator: str, x: torch.Tensor, residual: torch.Tensor | None, weights: Weights, bounds: Bounds, eps: float, offsets: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summed = x if residual is None else x + residual
        return norm(operator, summed, weights, bounds, eps, offsets), summed

    return run


def _triton(
    operator: str, x: torch.Tensor, residual: torch.Tensor | None, weights: Weights, bounds: Bounds, eps: float, offsets: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    require_triton(operator, x)
    if x.dim() != 2:
        raise ValueError(f"{operator}: x: must be [T, D], not {list(x.shape)}")
    from fusiontrain_kernels.rms_norm import triton_ops

    check_weights(operator, "weights", weights, (x.shape[1],), x)
    if residual is not None:
        check_like(operator, "residual", residual, x.shape, x)
    if offsets is None:
        check_bounds(operator, bounds, len(weights), len(x))
    out, summed, _ = triton_ops.rms_norm(x, residual, list(weights), device_offsets(bounds, offsets, len(weights), x, operator), eps)
    return out, summed


_IMPLEMENTATIONS = {"reference": _in_torch(reference.rms_norm), "eager": _in_torch(eager.rms_norm), "triton": _triton}
