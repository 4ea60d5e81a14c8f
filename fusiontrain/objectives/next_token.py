"""Next-token prediction: cross-entropy over the vocabulary, where a label is."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.types import IGNORE_INDEX, LossTerm
from fusiontrain_kernels.linear_cross_entropy import linear_cross_entropy_by_row


class NextToken(nn.Module):
    """The language-model loss. It owns no weights: the model passes its head, which may be tied to the embedding.

    impl: of the head and its loss, see `linear_cross_entropy`. z_loss: weight of the squared log of the softmax's denominator, which keeps it near
    one (PaLM, arXiv 2204.02311, section 5; Chameleon, arXiv 2405.09818: 1e-5). It is part of the loss in training mode alone: what evaluation
    reports stays a likelihood.
    """

    def __init__(self, impl: str = "auto", z_loss: float = 0.0) -> None:
        super().__init__()
        self.impl, self.z_loss = impl, z_loss

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, num_labels: int) -> LossTerm:
        """hidden [n, D], weight [V, D], labels [n] int64, loss_weights [n] float32 -> weighted sum, number of labels; its rows are those of `hidden`.

        Rows labelled IGNORE_INDEX are left out before the head, which is most of the head's cost where images are. num_labels: how many
        rows are not, a host number, so that nothing waits for the device to count them.
        """
        rows = (labels != IGNORE_INDEX).nonzero_static(size=num_labels).squeeze(1)
        z_loss = self.z_loss if self.training else 0.0
        total, parts = linear_cross_entropy_by_row(hidden[rows], weight, labels[rows], loss_weights[rows], z_loss=z_loss, impl=self.impl)
        return LossTerm(total, torch.full((), num_labels, dtype=torch.int64, device=hidden.device), parts, rows)
