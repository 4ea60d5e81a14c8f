"""Rectified flow (Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747): images on straight lines to noise."""

from __future__ import annotations

import torch

from fusiontrain.objectives.gaussian_path import GaussianPath
from fusiontrain.types import Payload


class FlowMatching(GaussianPath):
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
        """The shifted draw times the image's cap."""
        return self._shift(payload.timesteps) * payload.max_timesteps

    def coefficients(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = levels.double()
        return 1 - t, t

    def target(self, values: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        return self.velocity(values, noise, levels)

    def estimates(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rest, t = self.beside(level, x)
        return x - t * prediction, x + rest * prediction

    def clock(self, level: torch.Tensor) -> torch.Tensor:
        return level.double()

    def velocity(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The same all along the line."""
        del level
        return noise - clean

    def sampling_levels(self, steps: int) -> torch.Tensor:
        """Evenly spaced, then shifted. Raises ValueError below one step."""
        if steps < 1:
            raise ValueError(f"steps={steps}: must be at least 1")
        return self._shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).float()

    def _shift(self, t: torch.Tensor) -> torch.Tensor:
        return self.time_shift * t / (1 + (self.time_shift - 1) * t)
