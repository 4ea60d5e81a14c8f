"""`torch.nn.functional.grouped_mm`: one launch of PyTorch's own, at the price of stacking the weights in every call.

An operator of ours around it, because under torch.compile torch itself takes bfloat16 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fusiontrain_kernels._segments import scatter_live, without_none

Tensors = Sequence[torch.Tensor]


def check(x: torch.Tensor, width: int) -> None:
    """Raises ValueError where grouped_mm is missing or would refuse x."""
    if not hasattr(F, "grouped_mm"):
        raise ValueError(f"modality_gemm: impl='grouped_mm': torch {torch.__version__} has no torch.nn.functional.grouped_mm: choose another impl")
    if x.dtype == torch.float64:
        raise ValueError("modality_gemm: impl='grouped_mm': it has no float64: choose another impl")
    size = x.element_size()
    if x.shape[1] * size % 16 or width * size % 16:
        raise ValueError(f"modality_gemm: impl='grouped_mm': rows of {x.shape[1]} and {width} {x.dtype} must be multiples of 16 bytes: choose another impl")


def modality_gemm(x: torch.Tensor, weights: Tensors, biases: Sequence[torch.Tensor | None] | None, offsets: torch.Tensor) -> torch.Tensor:
    """See the package."""
    check(x, len(weights[0]))
    out = grouped_gemm(x, list(weights), offsets)
    if biases is None or all(bias is None for bias in biases):
        return out
    table = torch.stack(without_none(biases, weights))
    owners = torch.searchsorted(offsets[1:], torch.arange(len(x), dtype=offsets.dtype, device=x.device), right=True)
    return out + table[owners]


@torch.library.custom_op("fusiontrain::grouped_gemm", mutates_args=())
def grouped_gemm(x: torch.Tensor, weights: Sequence[torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
    """offsets [M + 1] int32 on x's device -> [T, N]."""
    return F.grouped_mm(_aligned(x), torch.stack(list(weights)).transpose(1, 2), offs=offsets[1:])


@torch.library.custom_op("fusiontrain::grouped_gemm_backward", mutates_args=())
def grouped_gemm_backward(
    grad: torch.Tensor, x: torch.Tensor, weights: Sequence[torch.Tensor], offsets: torch.Tensor, x_live: bool, weights_live: Sequence[bool]
) -> list[torch.Tensor]:
    """-> gradients of x, if live, then of the live weights [N, K]."""
    grad, grads = _aligned(grad), []
    if x_live:
        grads.append(F.grouped_mm(grad, torch.stack(list(weights)), offs=offsets[1:]))
    if any(weights_live):
        found = F.grouped_mm(grad.t(), _aligned(x), offs=offsets[1:])
        grads += [weight_grad.clone() for weight_grad, live in zip(found, weights_live, strict=True) if live]
    return grads


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x itself where its rows begin at multiples of 16 bytes, else a copy."""
    size = x.element_size()
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) * size % 16 == 0 and x.storage_offset() * size % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@grouped_gemm.register_fake
def _(x: torch.Tensor, weights: Tensors, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(x), len(weights[0]))


@grouped_gemm_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, weights: Tensors, offsets: torch.Tensor, x_live: bool, weights_live: Sequence[bool]) -> list[torch.Tensor]:
    return [x.new_empty(x.shape)] * x_live + [weights[0].new_empty(weights[0].shape) for live in weights_live if live]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weights, offsets = inputs
    ctx.save_for_backward(x, offsets, *weights)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, offsets, *weights = ctx.saved_tensors
    x_live, live = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1])
    grads = grouped_gemm_backward(grad, x, weights, offsets, x_live, live)
    return grads[0] if x_live else None, scatter_live(grads[x_live:], live), None


grouped_gemm.register_autograd(_differentiate, setup_context=_save)
