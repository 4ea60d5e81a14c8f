"""The head and its loss some rows at a time, so that the logits of all rows never exist together.

The gradients are made in the forward, where the logits are: they overwrite them, and the backward only scales. (As Liger-Kernel does,
arXiv 2410.10989; unlike there the host asks for nothing, and the weight's gradient is summed in float32.)
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from fusiontrain_kernels._launch import on_device

ROWS = {"chunked": 512, "triton": 1024}
"""Rows of a chunk. 1024 rows of 128,256 bfloat16 logits are 0.26 GB."""
_CACHED_ROWS = 16
"""Rows of which "chunked" has float32 copies at a time: few enough to stay in a processor's cache between the passes over them."""


def _softmax_torch(logits: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, losses: torch.Tensor, z_loss: float, differentiate: bool) -> None:
    targets, row_weights = labels.clamp(min=0)[:, None], loss_weights.to(losses.dtype) * (labels >= 0)
    for low in range(0, len(logits), _CACHED_ROWS):
        rows = slice(low, low + _CACHED_ROWS)
        _softmax_rows(logits[rows], targets[rows], row_weights[rows], losses[rows], z_loss, differentiate)


def _softmax_rows(logits: torch.Tensor, target: torch.Tensor, row_weights: torch.Tensor, losses: torch.Tensor, z_loss: float, differentiate: bool) -> None:
    row_losses, slopes = -logits.log_softmax(-1, dtype=losses.dtype).gather(1, target)[:, 0], row_weights
    if z_loss:
        lse = logits.to(losses.dtype).logsumexp(-1)
        row_losses, slopes = row_losses + z_loss * lse.square(), row_weights * (1 + 2 * z_loss * lse)
    losses.copy_(row_losses * row_weights)
    if differentiate:
        grad = logits.softmax(-1, dtype=losses.dtype).mul_(slopes[:, None])  # not exp of the above: slow where it is nearly 0
        logits.copy_(grad.scatter_add_(1, target, -row_weights[:, None]))


def _softmax_triton(logits: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, losses: torch.Tensor, z_loss: float, differentiate: bool) -> None:
    from fusiontrain_kernels.linear_cross_entropy import triton_kernels

    with on_device(logits):
        triton_kernels.launch(logits, labels, loss_weights, losses, z_loss, differentiate)


def _add_product(into: torch.Tensor, logits_grad: torch.Tensor, hidden: torch.Tensor, impl: str) -> None:
    """into += logits_grad.T @ hidden, with the sum in into's dtype."""
    if into.dtype == hidden.dtype:
        into.addmm_(logits_grad.T, hidden)
    elif impl == "triton":
        from fusiontrain_kernels.modality_gemm.triton_ops import accumulate

        offsets = torch.arange(2, dtype=torch.int32, device=hidden.device) * len(hidden)
        accumulate(hidden, logits_grad, [into], offsets, [True])
    else:
        into.add_(logits_grad.T @ hidden)


@torch.library.custom_op("fusiontrain::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor,
    z_loss: float,
    hidden_live: bool,
    weight_live: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss, its gradients to hidden [n, D] and weight [V, D] (no elements where not live), each row's part of it [n]. impl: chunked, triton."""
    softmax = _softmax_triton if impl == "triton" else _softmax_torch
    rows = ROWS[impl]
    losses, hidden_grad, weight_grad = _outputs(hidden, weight, hidden_live, weight_live, rows)
    weight_grad.zero_()
    buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))  # one for all chunks: fresh memory is slower than the product
    for low in range(0, len(hidden), rows):
        chunk = slice(low, low + rows)
        logits = torch.mm(hidden[chunk], weight.T, out=buffer[: len(hidden) - low])
        softmax(logits, labels[chunk], loss_weights[chunk], losses[chunk], z_loss, hidden_live or weight_live)
        if hidden_live:
            torch.mm(logits, weight, out=hidden_grad[chunk])
        if weight_live:
            _add_product(weight_grad, logits, hidden[chunk], impl)
    return losses.sum(), hidden_grad, weight_grad, losses


def _outputs(hidden: torch.Tensor, weight: torch.Tensor, hidden_live: bool, weight_live: bool, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden_grad = hidden.new_empty(hidden.shape if hidden_live else (0,))
    weight_grad = weight.new_empty(weight.shape if weight_live else (0,), dtype=weight.dtype if len(hidden) <= rows else wide)
    return hidden.new_empty(len(hidden), dtype=wide), hidden_grad, weight_grad


@linear_cross_entropy.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor,
    z_loss: float,
    hidden_live: bool,
    weight_live: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    losses, hidden_grad, weight_grad = _outputs(hidden, weight, hidden_live, weight_live, ROWS[impl])
    return losses.new_empty(()), hidden_grad, weight_grad, losses


def _save(ctx, inputs, output) -> None:
    _, weight, _, _, _, ctx.hidden_live, ctx.weight_live, _ = inputs
    _, hidden_grad, weight_grad, losses = output
    ctx.dtype = weight.dtype
    ctx.mark_non_differentiable(hidden_grad, weight_grad, losses)
    ctx.save_for_backward(hidden_grad, weight_grad)


def _backward(ctx, grad: torch.Tensor, *_unused: object):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy: impl='chunked' and 'triton' have no second derivative: choose impl='reference'")
    hidden_grad, weight_grad = ctx.saved_tensors
    hidden_scaled = _scaled(hidden_grad, grad, hidden_grad.dtype) if ctx.hidden_live else None
    return hidden_scaled, _scaled(weight_grad, grad, ctx.dtype) if ctx.weight_live else None, *[None] * 6


def _scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x * factor in one pass: a float32 product of the size of a head's weight would be gigabytes."""
    return torch.mul(x, factor, out=x.new_empty(x.shape, dtype=dtype))


linear_cross_entropy.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.fusiontrain.linear_cross_entropy)
def _flops(
    hidden: tuple[int, int],
    weight: tuple[int, int],
    labels: object,
    loss_weights: object,
    z_loss: float,
    hidden_live: bool,
    weight_live: bool,
    *_: object,
    **__: object,
) -> int:
    """Products with the head, for torch's counter, which does not look inside operators."""
    return 2 * hidden[0] * weight[0] * weight[1] * (1 + hidden_live + weight_live)
