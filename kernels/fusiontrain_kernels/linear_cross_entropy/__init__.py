"""The language-model head and its loss as one operator."""

from __future__ import annotations

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels.linear_cross_entropy import reference

_IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy}


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """`sum over r of loss_weights[r] * -log softmax(hidden[r] @ weight.T)[labels[r]]`, a float32 scalar (float64 for float64 input).

    hidden [n, D]; weight [V, D]; labels [n] int64 in [0, V); loss_weights [n] float32. n may be 0: the sum is then 0 and its gradients
    are zero, not None. impl: auto, reference. Raises ValueError for another impl.
    """
    return choose("linear_cross_entropy", _IMPLEMENTATIONS, impl, auto="reference")(hidden, weight, labels, loss_weights)
