"""The softmax part of the loss in Triton: two passes over the logits of a row, the second overwrites them with their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusiontrain_kernels._launch import accumulator

BLOCK, WARPS = 8192, 16
"""Logits of a row at a time."""


@triton.jit
def softmax_loss(
    logits, labels, loss_weights, losses, V, stride_logits,
    Z_LOSS: tl.constexpr, DIFFERENTIATE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses[r] = weight * (lse - logits[label] + Z_LOSS * lse^2), 0 where the label is negative, NaN where it is not
    below V; logits become its gradient."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride_logits
    column = tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    weight = tl.where(label >= 0, tl.load(loss_weights + row).to(ACC), 0.0)
    largest = tl.full((BLOCK,), float("-inf"), ACC)
    total = tl.zeros((BLOCK,), ACC)
    for low in range(0, V, BLOCK):
        value = tl.load(start + low + column, mask=column < V - low, other=float("-inf")).to(ACC)
        higher = tl.maximum(largest, value)
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a lane that has seen no logit yet
        total = total * tl.exp(largest - safe) + tl.exp(value - safe)
        largest = higher
    top = tl.max(largest, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    target = tl.load(start + tl.maximum(label, 0), mask=label < V, other=float("nan")).to(ACC)
    tl.store(losses + row, weight * (lse - target + Z_LOSS * lse * lse))
    if DIFFERENTIATE:
        slope = weight * (1.0 + 2.0 * Z_LOSS * lse)
        for low in range(0, V, BLOCK):
            mask = column < V - low
            value = tl.load(start + low + column, mask=mask, other=0.0).to(ACC)
            grad = slope * tl.exp(value - lse) - tl.where(low + column == label, weight, 0.0)
            tl.store(start + low + column, grad.to(logits.dtype.element_ty), mask=mask)


def launch(logits: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, losses: torch.Tensor, z_loss: float, differentiate: bool) -> None:
    """Fill losses [n] and, with `differentiate`, turn logits [n, V], whose rows are contiguous, into their gradient."""
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    softmax_loss[(len(logits),)](
        logits, labels.contiguous(), loss_weights.contiguous(), losses, logits.shape[1], logits.stride(0),
        Z_LOSS=z_loss, DIFFERENTIATE=differentiate, ACC=accumulator(logits), BLOCK=block, num_warps=min(WARPS, max(1, block // 256)),
    )  # fmt: skip
