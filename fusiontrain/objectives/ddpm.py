"""Denoising diffusion (Ho et al., arXiv 2006.11239) as Transfusion (arXiv 2408.11039, section 2.2) and LMFusion train it, on the cosine
schedule of Nichol and Dhariwal (arXiv 2102.09672, section 3.2). They predict the noise; the image and v may be predicted instead."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fusiontrain.objectives.gaussian_path import GaussianPath
from fusiontrain.types import Payload

COSINE_OFFSET = 0.008  # keeps the first steps from adding next to no noise
MAX_BETA = 0.999  # the last steps would otherwise divide by zero

Prediction = Literal["eps", "v", "x0"]


def cosine_alpha_bar(num_timesteps: int) -> torch.Tensor:
    """The share of the signal's variance that is left after t = 0..num_timesteps steps, [num_timesteps + 1] float64.

    `f(t) = cos^2(pi / 2 * (t / T + s) / (1 + s))`, s = 0.008; `beta_t = min(1 - f(t) / f(t - 1), 0.999)`;
    `alpha_bar_t = product over i <= t of (1 - beta_i)`, which is f(t) / f(0) up to the first clipped beta.
    """
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos(math.pi / 2 * (t + COSINE_OFFSET) / (1 + COSINE_OFFSET)).square()
    betas = (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


class Ddpm(GaussianPath):
    """`x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps` at whole steps t; a noise level is t / num_timesteps.

    prediction: what the model predicts, in mean squared error. All three have the same minimiser, the mean of x_0 given x_t, and differ in how
    they weight its squared error by the level's signal-to-noise ratio `r = alpha_bar_t / (1 - alpha_bar_t)`:

    | prediction | target | weight |
    |---|---|---|
    | eps | eps | r (the papers; Ho et al., eq 14) |
    | v | sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 | r + 1 (Salimans and Ho, arXiv 2202.00512, section 4) |
    | x0 | x_0 | 1 |
    """

    alpha_bar: torch.Tensor

    def __init__(self, num_timesteps: int = 1000, prediction: Prediction = "eps") -> None:
        super().__init__()
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps={num_timesteps}: must be at least 1")
        self.num_timesteps, self.prediction = num_timesteps, prediction
        # float64: the sampler takes small differences of it. It follows from num_timesteps, so a checkpoint need not hold it.
        self.register_buffer("alpha_bar", cosine_alpha_bar(num_timesteps), persistent=False)

    def levels(self, payload: Payload) -> torch.Tensor:
        """One of the steps 1..(cap * num_timesteps) with equal chance, 0 where the cap is 0."""
        largest = (payload.max_timesteps * self.num_timesteps).round()
        t = torch.minimum((payload.timesteps * largest).floor() + 1, largest)
        return t / self.num_timesteps

    def coefficients(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_bar = self.alpha_bar[(levels * self.num_timesteps).round().long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def target(self, values: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        if self.prediction == "v":
            return self.velocity(values, noise, levels).to(values.dtype)
        return noise if self.prediction == "eps" else values

    def estimates(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, s = self.beside(level, x)
        if self.prediction == "v":
            return a * x - s * prediction, s * x + a * prediction
        if self.prediction == "eps":
            return (x - s * prediction) / a, prediction.double()
        return prediction.double(), (x - a * prediction) / s

    def clock(self, level: torch.Tensor) -> torch.Tensor:
        """The angle whose cosine and sine are the coefficients: about pi / 2 * level on the cosine schedule."""
        a, s = self.coefficients(level)
        return torch.atan2(s, a)

    def velocity(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """v, which is the derivative by that angle."""
        a, s = self.beside(level, clean)
        return a * noise - s * clean

    def sampling_levels(self, steps: int) -> torch.Tensor:
        """Evenly spaced over the whole steps of training. Raises ValueError unless 1 <= steps <= num_timesteps."""
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"steps={steps}: must be from 1 to num_timesteps={self.num_timesteps}")
        whole = [self.num_timesteps * (steps - i) // steps for i in range(steps + 1)]
        return torch.tensor(whole, dtype=torch.float32) / self.num_timesteps
