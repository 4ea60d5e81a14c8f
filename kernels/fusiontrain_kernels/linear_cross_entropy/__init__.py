"""The language-model head and its loss as one operator."""

from __future__ import annotations

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels._launch import auto_triton, require_triton
from fusiontrain_kernels._segments import check_like
from fusiontrain_kernels.linear_cross_entropy import chunked, reference


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, *, z_loss: float = 0.0, impl: str = "auto"
) -> torch.Tensor:
    """`sum over r of loss_weights[r] * -log softmax(hidden[r] @ weight.T)[labels[r]]`, a float32 scalar (float64 for float64 input).

    hidden [n, D]; weight [V, D]; labels [n] int64 below V (chunked refuses others, triton returns NaN); loss_weights [n] float32. A row whose
    label is negative counts for nothing, so the number of labels may stay on the device: `(labels >= 0).sum()`. n may be 0: the sum is then 0
    and its gradients are zero, not None.
    z_loss adds that many times the square of the log of the softmax's denominator to each row (PaLM, arXiv 2204.02311, section 5).

    impl: auto (triton on a GPU, else chunked), reference, chunked (512 rows at a time; the backward only scales, there is no second
    derivative), triton (1024 rows at a time, softmax and gradient in place). In none of them do loss_weights get a
    gradient. Raises ValueError for another impl, and for tensors that do not fit together.
    """
    return linear_cross_entropy_by_row(hidden, weight, labels, loss_weights, z_loss=z_loss, impl=impl)[0]


def linear_cross_entropy_by_row(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, *, z_loss: float = 0.0, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_cross_entropy`, and what each row adds to it: [n] of the sum's dtype, without gradient, which it has at hand anyway."""
    implementation = choose("linear_cross_entropy", _IMPLEMENTATIONS, impl, auto=auto_triton(hidden, "chunked"))
    _check(hidden, weight, labels, loss_weights)
    return implementation(hidden, weight, labels, loss_weights, z_loss)


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"linear_cross_entropy: hidden: must be [n, D], not {list(hidden.shape)}")
    if weight.dim() != 2 or len(weight) == 0:
        raise ValueError(f"linear_cross_entropy: weight: must be [V, {hidden.shape[1]}] with V > 0, not {list(weight.shape)}")
    check_like("linear_cross_entropy", "weight", weight, (len(weight), hidden.shape[1]), hidden, "hidden")
    for name, tensor, dtype in [("labels", labels, torch.int64), ("loss_weights", loss_weights, loss_weights.dtype)]:
        if tensor.shape != hidden.shape[:1] or tensor.dtype != dtype or tensor.device != hidden.device:
            wanted, found = f"{dtype} [{len(hidden)}] on {hidden.device}", f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"linear_cross_entropy: {name}: must be {wanted}, not {found}")


def _chunked(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, z_loss: float, impl: str = "chunked"
) -> tuple[torch.Tensor, torch.Tensor]:
    differentiate = torch.is_grad_enabled()
    hidden_live, weight_live = differentiate and hidden.requires_grad, differentiate and weight.requires_grad
    loss, _, _, losses = chunked.linear_cross_entropy(hidden, weight, labels, loss_weights, z_loss, hidden_live, weight_live, impl)
    return loss, losses


def _triton(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    require_triton("linear_cross_entropy", hidden)
    return _chunked(hidden, weight, labels, loss_weights, z_loss, "triton")


_IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy, "chunked": _chunked, "triton": _triton}
