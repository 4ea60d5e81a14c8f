"""Next-token prediction: cross-entropy over the vocabulary, where a label is."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.types import IGNORE_INDEX, LossTerm
from fusiontrain_kernels.linear_cross_entropy import linear_cross_entropy


class NextToken(nn.Module):
    """The language-model loss. It owns no weights: the model passes its head, which may be tied to the embedding."""

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor) -> LossTerm:
        """hidden [n, D], weight [V, D], labels [n] int64, loss_weights [n] float32 -> weighted sum, number of labels.

        Rows labelled IGNORE_INDEX are left out before the head, which is most of the head's cost where images are.
        """
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        total = linear_cross_entropy(hidden[rows], weight, labels[rows], loss_weights[rows])
        return LossTerm(total, torch.tensor(len(rows), dtype=torch.int64, device=hidden.device))
