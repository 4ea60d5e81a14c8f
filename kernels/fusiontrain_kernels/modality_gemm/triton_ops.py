"""The Triton modality_gemm as operators that torch.compile and autograd know. Borders of modalities are `offsets`, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from fusiontrain_kernels._launch import accumulator, architecture, nearest, on_device, same_strides, unit_stride
from fusiontrain_kernels._segments import scatter_live
from fusiontrain_kernels.modality_gemm import triton_kernels
from fusiontrain_kernels.modality_gemm.configs import CONFIGS, FLOAT32, SMALL, Config
from fusiontrain_kernels.swiglu.triton_ops import swiglu_backward

Tensors = Sequence[torch.Tensor]
GROUP = 8  # row tiles that run side by side and share a weight tile in the L2 cache


def _config(kernel: str, x: torch.Tensor, num_rows: int, num_columns: int) -> Config:
    if x.is_cuda and x.element_size() > 2:
        return FLOAT32
    config = nearest(CONFIGS, architecture(x))[kernel]
    fits = num_rows >= config.rows and num_columns >= config.columns
    return config if fits or not x.is_cuda else SMALL


def _tiles(config: Config, num_rows: int, num_columns: int, num_modalities: int) -> int:
    """Row tiles that `num_rows` rows in segments can need at most, times column tiles."""
    return (triton.cdiv(num_rows, config.rows) + num_modalities - 1) * triton.cdiv(num_columns, config.columns)


def _gemm(kernel: str, xs: Tensors, weights: Tensors, biases: Tensors, offsets: torch.Tensor) -> torch.Tensor:
    """`kernel`: "forward" multiplies by weight.T, "dgrad" by weight. weights: those of xs[0], then those of xs[1]."""
    num_modalities, transposed = len(weights) // len(xs), kernel == "dgrad"
    xs, weights = same_strides(xs), same_strides(weights)
    x, (num_rows, inner) = xs[0], xs[0].shape
    width = weights[0].shape[1 if transposed else 0]
    config = _config(kernel, x, num_rows, width)
    out = x.new_empty(num_rows, width)
    groups = tuple(tuple(weights[i : i + num_modalities]) for i in range(0, len(weights), num_modalities))
    added = tuple(bias.contiguous() for bias in biases)
    with on_device(x):
        triton_kernels.gemm[(_tiles(config, num_rows, width, num_modalities),)](
            tuple(xs), groups, added or groups[0], out, offsets, num_rows, width, inner, x.stride(0), weights[0].stride(0),
            M=num_modalities, PAIRS=len(xs), HAS_BIAS=bool(biases), TRANSPOSED=transposed, EVEN=inner % config.inner == 0, ACC=accumulator(x),
            BM=config.rows, BN=config.columns, BK=config.inner, GROUP=GROUP, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


@torch.library.custom_op("fusiontrain::modality_gemm", mutates_args=())
def gemm(x: torch.Tensor, weights: Tensors, biases: Tensors, offsets: torch.Tensor, main_grads: Tensors) -> torch.Tensor:
    """See the package. `biases` and `main_grads` have one entry a modality or none at all; main_grads matter to the backward alone."""
    return _gemm("forward", [x], weights, biases, offsets)


@gemm.register_fake
def _(x: torch.Tensor, weights: Tensors, biases: Tensors, offsets: torch.Tensor, main_grads: Tensors) -> torch.Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


@torch.library.custom_op("fusiontrain::modality_gemm_dgrad", mutates_args=())
def dgrad(grads: Tensors, weights: Tensors, offsets: torch.Tensor) -> torch.Tensor:
    """Sum over i of grads[i] @ weights of i; weights: those of grads[0], then those of grads[1]."""
    return _gemm("dgrad", grads, weights, [], offsets)


@dgrad.register_fake
def _(grads: Tensors, weights: Tensors, offsets: torch.Tensor) -> torch.Tensor:
    return grads[0].new_empty(grads[0].shape[0], weights[0].shape[1])


def _wgrad(x: torch.Tensor, grad: torch.Tensor, outs: Tensors, bias_outs: Tensors, offsets: torch.Tensor, live: Sequence[bool], add: bool) -> None:
    """Write into outs[i] (and add to it, if `add`) the gradient of the i-th live modality's weight."""
    x, grad = unit_stride(x), unit_stride(grad)
    inner, width = x.shape[1], grad.shape[1]
    config = _config("wgrad_add" if add else "wgrad", x, width, inner)
    remaining, remaining_bias = iter(outs), iter(bias_outs)
    places = tuple(next(remaining) if alive else outs[0] for alive in live)
    bias_places = tuple(next(remaining_bias) if alive else bias_outs[0] for alive in live) if bias_outs else places
    tiles = triton.cdiv(width, config.rows) * triton.cdiv(inner, config.columns)
    with on_device(x):
        triton_kernels.wgrad[(tiles, sum(live))](
            x, grad, places, bias_places, offsets, width, inner, x.stride(0), grad.stride(0),
            M=len(live), LIVE=sum(alive << m for m, alive in enumerate(live)), HAS_BIAS=bool(bias_outs), ACCUMULATE=add, ACC=accumulator(x),
            BM=config.rows, BN=config.columns, BK=config.inner, GROUP=GROUP, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


@torch.library.custom_op("fusiontrain::modality_gemm_wgrad", mutates_args=())
def wgrad(x: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor, live: Sequence[bool], dtype: torch.dtype, bias: bool) -> list[torch.Tensor]:
    """Gradients of the live modalities' weights [N, K], then, if `bias`, of their biases [N]."""
    outs, bias_outs = _wgrad_outputs(x, grad, live, dtype, bias)
    _wgrad(x, grad, outs, bias_outs, offsets, live, add=False)
    return outs + bias_outs


@wgrad.register_fake
def _(x: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor, live: Sequence[bool], dtype: torch.dtype, bias: bool) -> list[torch.Tensor]:
    outs, bias_outs = _wgrad_outputs(x, grad, live, dtype, bias)
    return outs + bias_outs


def _wgrad_outputs(x: torch.Tensor, grad: torch.Tensor, live: Sequence[bool], dtype: torch.dtype, bias: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    outs = [x.new_empty(grad.shape[1], x.shape[1], dtype=dtype) for alive in live if alive]
    return outs, [x.new_empty(grad.shape[1], dtype=dtype) for alive in live if alive and bias]


@torch.library.custom_op("fusiontrain::modality_gemm_accumulate", mutates_args=("main_grads",))
def accumulate(x: torch.Tensor, grad: torch.Tensor, main_grads: Tensors, offsets: torch.Tensor, live: Sequence[bool]) -> None:
    """main_grads[i] += the gradient of the i-th live modality's weight."""
    _wgrad(x, grad, main_grads, [], offsets, live, add=True)


def _weight_grads(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, live: Sequence[bool]) -> list[torch.Tensor | None]:
    return scatter_live(wgrad(x, grad, offsets, live, weight.dtype, False), live) if any(live) else [None] * len(live)


def _save_gemm(ctx, inputs, output) -> None:
    x, weights, biases, offsets, ctx.main_grads = inputs
    ctx.count, ctx.has_bias = len(weights), bool(biases)
    ctx.save_for_backward(x, offsets, *weights)


def _gemm_backward(ctx, grad: torch.Tensor):
    x, offsets, *weights = ctx.saved_tensors
    x_live, weights_live, biases_live = ctx.needs_input_grad[:3]
    live = [any(pair) for pair in zip(weights_live, biases_live or weights_live, strict=True)]
    x_grad = dgrad([grad], weights, offsets) if x_live else None
    weight_grads: list = [None] * len(weights)
    bias_grads: list = [None] * len(weights) if ctx.has_bias else []
    if any(live) and ctx.main_grads:
        accumulate(x, grad, [into for into, alive in zip(ctx.main_grads, live, strict=True) if alive], offsets, live)
    elif any(live):
        values = wgrad(x, grad, offsets, live, weights[0].dtype, ctx.has_bias)
        weight_grads = scatter_live(values[: sum(live)], live)
        bias_grads = scatter_live(values[sum(live) :], live) if ctx.has_bias else []
    return x_grad, weight_grads, bias_grads, None, [None] * len(ctx.main_grads)


gemm.register_autograd(_gemm_backward, setup_context=_save_gemm)


@torch.library.custom_op("fusiontrain::modality_swiglu", mutates_args=())
def gemm_swiglu(x: torch.Tensor, gates: Tensors, ups: Tensors, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> silu(gate) * up, gate, up, each [T, N]; the last two for the backward."""
    weights = same_strides([*gates, *ups])
    x, gates, ups = unit_stride(x), weights[: len(gates)], weights[len(gates) :]
    (num_rows, inner), width = x.shape, len(gates[0])
    config = _config("swiglu", x, num_rows, width)
    out, gate, up = (x.new_empty(num_rows, width) for _ in range(3))
    with on_device(x):
        triton_kernels.gemm_swiglu[(_tiles(config, num_rows, width, len(gates)),)](
            x, tuple(gates), tuple(ups), gate, up, out, offsets, num_rows, width, inner, x.stride(0), gates[0].stride(0),
            M=len(gates), EVEN=inner % config.inner == 0, ACC=accumulator(x),
            BM=config.rows, BN=config.columns, BK=config.inner, GROUP=GROUP, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out, gate, up


@gemm_swiglu.register_fake
def _(x: torch.Tensor, gates: Tensors, ups: Tensors, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, gate, up = (x.new_empty(x.shape[0], gates[0].shape[0]) for _ in range(3))
    return out, gate, up


def _save_swiglu(ctx, inputs, output) -> None:
    x, gates, ups, offsets = inputs
    _, gate, up = output
    ctx.count = len(gates)
    ctx.mark_non_differentiable(gate, up)
    ctx.save_for_backward(x, offsets, gate, up, *gates, *ups)


def _swiglu_backward(ctx, grad: torch.Tensor, *_unused: torch.Tensor):
    x, offsets, gate, up, *weights = ctx.saved_tensors
    x_live, gates_live, ups_live, _ = ctx.needs_input_grad
    gate_grad, up_grad = swiglu_backward(grad, gate, up)
    x_grad = dgrad([gate_grad, up_grad], weights, offsets) if x_live else None
    gate_grads = _weight_grads(x, gate_grad, weights[0], offsets, gates_live)
    return x_grad, gate_grads, _weight_grads(x, up_grad, weights[0], offsets, ups_live), None


gemm_swiglu.register_autograd(_swiglu_backward, setup_context=_save_swiglu)
