"""What the image objectives share: the loss of an image, and levels that lie beside tensors of more dims."""

from __future__ import annotations

import torch

from fusiontrain.types import LossTerm, Payload


def image_mean_squared_error(prediction: torch.Tensor, target: torch.Tensor, payload: Payload) -> LossTerm:
    """Sum over target images of the mean squared error over all numbers of the image (Transfusion 2.2), and their number.

    prediction and target [N, C]; the term's rows count from 0. In float32. Without a target image the sum is 0 and the prediction's gradient zero, not None.
    """
    is_target, image_ids = payload.is_target, payload.image_ids
    tokens = torch.zeros(len(is_target), device=prediction.device).index_add_(
        0, image_ids, torch.ones(len(image_ids), device=prediction.device)
    )
    # Weights and one plain sum, not a scattered sum per image: the latter adds in any order on a GPU.
    weights = is_target.float() / tokens.clamp(min=1)
    errors = (prediction.float() - target.float()).square().mean(-1)  # [N]
    parts = errors * weights[image_ids]
    return LossTerm(parts.sum(), is_target.sum(), parts.detach(), torch.arange(len(parts), device=parts.device))


def beside(levels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`levels`, shaped as the first dims of `values` (or a scalar), with dims of one appended so that the two broadcast."""
    return levels.reshape(levels.shape + (1,) * (values.ndim - levels.ndim))
