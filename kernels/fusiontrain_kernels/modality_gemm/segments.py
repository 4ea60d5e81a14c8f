"""One ATen GEMM per modality, each into its rows of one output: what a library of dense products can do, with no pass over memory besides.

The bits are those of the reference, whose concatenations copy every output, and every gradient of x, once more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fusiontrain_kernels._segments import check_bounds


def modality_gemm(x: torch.Tensor, weights: Sequence[torch.Tensor], bounds: tuple[int, ...], biases: Sequence[torch.Tensor | None] | None) -> torch.Tensor:
    """See the package. One weight is a plain `F.linear`, so a tied model computes exactly what a dense one does."""
    check_bounds("modality_gemm", bounds, len(weights), len(x))
    biases = [None] * len(weights) if biases is None else biases
    if len(weights) == 1:
        return F.linear(x, weights[0], biases[0])
    return _Segments.apply(x, bounds, *weights, *biases)


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bounds: tuple[int, ...], *tensors: Any) -> torch.Tensor:
        weights, biases = tensors[: len(bounds) - 1], tensors[len(bounds) - 1 :]
        ctx.bounds = bounds
        ctx.save_for_backward(x, *weights)
        out = x.new_empty(len(x), len(weights[0]))
        for (low, high), weight, bias in zip(itertools.pairwise(bounds), weights, biases, strict=True):
            if bias is None:
                torch.mm(x[low:high], weight.t(), out=out[low:high])
            else:
                torch.addmm(bias, x[low:high], weight.t(), out=out[low:high])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_live, _, *live = ctx.needs_input_grad
        count = len(weights)
        x_grad = x.new_empty(x.shape) if x_live else None
        weight_grads: list[torch.Tensor | None] = [None] * count
        bias_grads: list[torch.Tensor | None] = [None] * count
        for m, (low, high) in enumerate(itertools.pairwise(ctx.bounds)):
            rows = grad[low:high]
            if x_grad is not None:
                torch.mm(rows, weights[m], out=x_grad[low:high])
            if live[m]:
                weight_grads[m] = rows.t().mm(x[low:high])
            if live[count + m]:
                bias_grads[m] = rows.sum(0)
        return x_grad, None, *weight_grads, *bias_grads
