"""One ATen GEMM per modality, each into its rows of one output: what a library of dense products can do, with no pass over memory besides.

The bits are those of the reference, whose concatenations copy every output, and every gradient of x, once more. Borders are a tensor on the
host, read inside the operators, so torch.compile sees no numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from fusiontrain_kernels._segments import check_bounds, scatter_live, without_none

Tensors = Sequence[torch.Tensor]
Biases = Sequence[torch.Tensor | None]


def modality_gemm(x: torch.Tensor, weights: Tensors, bounds: tuple[int, ...], biases: Biases | None, offsets: torch.Tensor | None) -> torch.Tensor:
    """See the package. One weight is a plain `F.linear`, so a tied model computes exactly what a dense one does."""
    is_watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if not is_watched or offsets is None or not offsets.is_cpu:
        check_bounds("modality_gemm", bounds, len(weights), len(x))
    if len(weights) == 1:
        return F.linear(x, weights[0], None if biases is None else biases[0])
    if not is_watched:
        return _Plain.apply(x, bounds, len(weights), *weights, *without_none(biases, weights))
    offsets = torch.tensor(bounds, dtype=torch.int32) if offsets is None or not offsets.is_cpu else offsets
    return segments_gemm(x, list(weights), without_none(biases, weights), offsets)


@torch.library.custom_op("fusiontrain::segments_gemm", mutates_args=())
def segments_gemm(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
    """offsets [M + 1] int32 on the CPU, wherever x is. biases: one a modality, or none at all."""
    bounds = tuple(offsets.tolist())
    check_bounds("modality_gemm", bounds, len(weights), len(x))
    return _forward(x, weights, biases, bounds)


def _forward(x: torch.Tensor, weights: Tensors, biases: Tensors, bounds: tuple[int, ...]) -> torch.Tensor:
    out = _empty_out(x, weights)
    for m, (low, high) in enumerate(itertools.pairwise(bounds)):
        if biases:
            torch.addmm(biases[m], x[low:high], weights[m].t(), out=out[low:high])
        else:
            torch.mm(x[low:high], weights[m].t(), out=out[low:high])
    return out


def _empty_out(x: torch.Tensor, weights: Tensors, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


@torch.library.custom_op("fusiontrain::segments_gemm_backward", mutates_args=())
def segments_gemm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    offsets: torch.Tensor,
    x_live: bool,
    weights_live: Sequence[bool],
    biases_live: Sequence[bool],
) -> list[torch.Tensor]:
    """-> gradients of x, if live, then of the live weights [N, K], then of the live biases [N]."""
    return _backward(grad, x, weights, offsets.tolist(), x_live, weights_live, biases_live)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weights: Tensors, bounds: Sequence[int], x_live: bool, weights_live: Sequence[bool], biases_live: Sequence[bool]
) -> list[torch.Tensor]:
    grads = _empty_grads(grad, x, weights, None, x_live, weights_live, biases_live)
    remaining = iter(grads)
    rows = list(itertools.pairwise(bounds))
    if x_live:
        x_grad = next(remaining)
        for (low, high), weight in zip(rows, weights, strict=True):
            torch.mm(grad[low:high], weight, out=x_grad[low:high])
    for (low, high), live in zip(rows, weights_live, strict=True):
        if live:
            torch.mm(grad[low:high].t(), x[low:high], out=next(remaining))
    for (low, high), live in zip(rows, biases_live, strict=False):  # none at all without biases
        if live:
            torch.sum(grad[low:high], 0, out=next(remaining))
    return grads


def _empty_grads(
    grad: torch.Tensor, x: torch.Tensor, weights: Tensors, _: object, x_live: bool, weights_live: Sequence[bool], biases_live: Sequence[bool]
) -> list[torch.Tensor]:
    shapes = [list(x.shape)] * x_live + [list(weights[0].shape)] * sum(weights_live) + [[len(weights[0])]] * sum(biases_live)
    return [x.new_empty(shape) for shape in shapes]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weights, _, offsets = inputs
    ctx.save_for_backward(x, offsets, *weights)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, offsets, *weights = ctx.saved_tensors
    x_live, weights_live, biases_live = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1]), list(ctx.needs_input_grad[2] or [])
    grads = segments_gemm_backward(grad, x, weights, offsets, x_live, weights_live, biases_live)
    first, second = int(x_live), int(x_live) + sum(weights_live)
    return grads[0] if x_live else None, scatter_live(grads[first:second], weights_live), scatter_live(grads[second:], biases_live), None


class _Plain(torch.autograd.Function):
    """The same without an operator around it: that is for whoever looks at operators (torch.compile, selective recomputation, a counter), and calling
    it takes longer than a small product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bounds: tuple[int, ...], count: int, *weights_and_biases: torch.Tensor) -> torch.Tensor:
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        ctx.save_for_backward(x, *weights)
        ctx.bounds = bounds
        return _forward(x, weights, biases, bounds)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_live, _, _, *live = ctx.needs_input_grad
        grads = _backward(grad, x, weights, ctx.bounds, x_live, live[: len(weights)], live[len(weights) :])
        return grads[0] if x_live else None, None, None, *scatter_live(grads[x_live:], live)


segments_gemm.register_fake(_empty_out)
segments_gemm_backward.register_fake(_empty_grads)
segments_gemm.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.fusiontrain.segments_gemm)
def _flops(x: tuple[int, int], weights: list[tuple[int, int]], *_: object, **__: object) -> int:
    """For torch's counter, which does not look inside operators."""
    return 2 * x[0] * weights[0][0] * weights[0][1]


@register_flop_formula(torch.ops.fusiontrain.segments_gemm_backward, get_raw=True)
def _backward_flops(
    grad: torch.Tensor, x: torch.Tensor, weights: Tensors, offsets: torch.Tensor, x_live: bool, weights_live: Sequence[bool], *_: object, **__: object
) -> int:
    trained = sum(rows for rows, live in zip(offsets.diff().tolist(), weights_live, strict=True) if live)
    return 2 * weights[0].numel() * (len(x) * x_live + trained)
