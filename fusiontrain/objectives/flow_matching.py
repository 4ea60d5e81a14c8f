"""Rectified flow (Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747): images on straight lines to noise."""

from __future__ import annotations

import torch
from torch import nn

from fusiontrain.objectives.images import beside, image_mean_squared_error
from fusiontrain.types import LossTerm, Payload


class FlowMatching(nn.Module):
    """`x_t = (1 - t) x_0 + t eps`, and the model predicts the velocity `eps - x_0`. A noise level is t itself.

    time_shift: s in `t' = s t / (1 + (s - 1) t)`, applied to uniform draws and to the sampler's steps alike; above 1 it moves both towards
    noise, as larger images want (Esser et al., arXiv 2403.03206, section 5.3.2).
    """

    def __init__(self, time_shift: float = 1.0) -> None:
        super().__init__()
        if time_shift <= 0:
            raise ValueError(f"time_shift={time_shift}: must be above 0")
        self.time_shift = time_shift

    def levels(self, payload: Payload) -> torch.Tensor:
        """Noise level of each image, [I] float32: the shifted draw times the image's cap."""
        return self._shift(payload.timesteps) * payload.max_timesteps

    def corrupt(self, values: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """values and noise [N, C], levels [N] -> noised [N, C]."""
        t = beside(levels, values)
        return (1 - t) * values + t * noise

    def target(self, values: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """What the model should predict, [N, C]."""
        del levels  # the same velocity all along the line
        return noise - values

    def loss(self, prediction: torch.Tensor, payload: Payload, noise: torch.Tensor, levels: torch.Tensor) -> LossTerm:
        """prediction and noise [N, C], levels [I]. Sum over target images of the image's mean squared error, and their number."""
        return image_mean_squared_error(prediction, self.target(payload.values, noise, levels), payload)

    def sampling_levels(self, steps: int) -> torch.Tensor:
        """Levels of a sampler of `steps` steps, [steps + 1] float32 from 1 to 0. Raises ValueError below one step."""
        if steps < 1:
            raise ValueError(f"steps={steps}: must be at least 1")
        return self._shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).float()

    def step(
        self,
        x: torch.Tensor,
        prediction: torch.Tensor,
        level: torch.Tensor,
        next_level: torch.Tensor,
        noise: torch.Tensor,
        *,
        clip: float | None = None,
    ) -> torch.Tensor:
        """One Euler step from `level` to `next_level` (scalars, or shaped as the first dims of x). x [..., C] -> [..., C].

        noise: not used, the flow is deterministic. clip: keep the clean estimate inside [-clip, clip] and walk straight to it.
        """
        del noise
        if clip is None:
            return x + beside(next_level - level, x) * prediction
        clean = self.clean_estimate(x, prediction, level).clamp(-clip, clip)
        return clean + beside(next_level / level, x) * (x - clean)

    def clean_estimate(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The clean image that the prediction points at from x."""
        return x - beside(level, x) * prediction

    def _shift(self, t: torch.Tensor) -> torch.Tensor:
        return self.time_shift * t / (1 + (self.time_shift - 1) * t)
