"""What the image objectives share: a way from the image to noise, known at every noise level, and the loss of an image."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from fusiontrain.types import LossTerm, Payload


class GaussianPath(nn.Module):
    """`x = a x_0 + s eps` with a and s functions of the noise level in [0, 1]: from the image (a = 1, s = 0) to noise (a = 0 or next to it).

    Images should have about unit variance. Levels are [I] or [N], a scalar, or shaped as the first dims of the values beside them.
    Where a sampler goes by an ordinary differential equation, `clock` is its time and `velocity` what x changes by in that time.
    """

    @abstractmethod
    def levels(self, payload: Payload) -> torch.Tensor:
        """Noise level of each image, [I] float32, 0 where the cap is 0."""

    @abstractmethod
    def coefficients(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, s), float64, shaped as the levels."""

    @abstractmethod
    def target(self, values: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """What the model should predict, [N, C]; levels [N]."""

    @abstractmethod
    def estimates(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean image and the noise that the prediction points at from x, at a level above 0; float64."""

    @abstractmethod
    def clock(self, level: torch.Tensor) -> torch.Tensor:
        """Time of the flow at a level, float64; it grows with the level."""

    @abstractmethod
    def velocity(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Change of `a x_0 + s eps` by the clock."""

    @abstractmethod
    def sampling_levels(self, steps: int) -> torch.Tensor:
        """Levels of a sampler of `steps` steps, [steps + 1] float32 from 1 to 0. Raises ValueError for a number that cannot be."""

    def corrupt(self, values: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """values and noise [N, C], levels [N] -> noised [N, C]."""
        a, s = self.beside(levels, values)
        return a.to(values.dtype) * values + s.to(values.dtype) * noise

    def loss(self, prediction: torch.Tensor, payload: Payload, noise: torch.Tensor, levels: torch.Tensor) -> LossTerm:
        """prediction and noise [N, C], levels [I]. Sum over target images of the image's mean squared error, and their number."""
        return image_mean_squared_error(prediction, self.target(payload.values, noise, levels[payload.image_ids]), payload)

    def beside(self, levels: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`coefficients`, with dims of one appended so that they broadcast with `values`."""
        a, s = self.coefficients(levels)
        return beside(a, values), beside(s, values)


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
