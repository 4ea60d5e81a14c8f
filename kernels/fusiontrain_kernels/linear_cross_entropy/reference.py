"""The specification of linear_cross_entropy."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package; also each row's part of the sum, [n] without gradient. Logits in the model's dtype, their log-softmax in float32 at least."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels >= 0
    losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square()
    losses = losses * loss_weights.detach() * counted
    return losses.sum(), losses.detach()
