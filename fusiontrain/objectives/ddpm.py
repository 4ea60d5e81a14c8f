"""Denoising diffusion (Ho et al., arXiv 2006.11239) as Transfusion (arXiv 2408.11039, section 2.2) and LMFusion train it: the model
predicts the noise, on the cosine schedule of Nichol and Dhariwal (arXiv 2102.09672, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import nn

from fusiontrain.objectives.images import beside, image_mean_squared_error
from fusiontrain.types import LossTerm, Payload

COSINE_OFFSET = 0.008  # keeps the first steps from adding next to no noise
MAX_BETA = 0.999  # the last steps would otherwise divide by zero


def cosine_alpha_bar(num_timesteps: int) -> torch.Tensor:
    """The share of the signal's variance that is left after t = 0..num_timesteps steps, [num_timesteps + 1] float64.

    `f(t) = cos^2(pi / 2 * (t / T + s) / (1 + s))`, s = 0.008; `beta_t = min(1 - f(t) / f(t - 1), 0.999)`;
    `alpha_bar_t = product over i <= t of (1 - beta_i)`, which is f(t) / f(0) up to the first clipped beta.
    """
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos(math.pi / 2 * (t + COSINE_OFFSET) / (1 + COSINE_OFFSET)).square()
    betas = (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


class Ddpm(nn.Module):
    """`x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps` at whole steps t, and the model predicts eps.

    A noise level is t / num_timesteps; level 0 is the clean image. Images should have about unit variance.
    """

    alpha_bar: torch.Tensor

    def __init__(self, num_timesteps: int = 1000) -> None:
        super().__init__()
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps={num_timesteps}: must be at least 1")
        self.num_timesteps = num_timesteps
        # float64: the sampler takes small differences of it. It follows from num_timesteps, so a checkpoint need not hold it.
        self.register_buffer("alpha_bar", cosine_alpha_bar(num_timesteps), persistent=False)

    def levels(self, payload: Payload) -> torch.Tensor:
        """Noise level of each image, [I] float32: one of the steps 1..(cap * num_timesteps) with equal chance, 0 where the cap is 0."""
        largest = (payload.max_timesteps * self.num_timesteps).round()
        t = torch.minimum((payload.timesteps * largest).floor() + 1, largest)
        return t / self.num_timesteps

    def corrupt(self, values: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """values and noise [N, C], levels [N] -> noised [N, C]."""
        alpha_bar = self._alpha_bar_at(levels, values)
        return alpha_bar.sqrt().to(values.dtype) * values + (1 - alpha_bar).sqrt().to(values.dtype) * noise

    def target(self, values: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """What the model should predict, [N, C]."""
        del values, levels
        return noise

    def loss(self, prediction: torch.Tensor, payload: Payload, noise: torch.Tensor, levels: torch.Tensor) -> LossTerm:
        """prediction and noise [N, C], levels [I]. Sum over target images of the image's mean squared error, and their number."""
        return image_mean_squared_error(prediction, self.target(payload.values, noise, levels), payload)

    def sampling_levels(self, steps: int) -> torch.Tensor:
        """Levels of a sampler of `steps` steps, [steps + 1] float32 from 1 to 0, evenly spaced over the whole steps of training.

        Raises ValueError unless 1 <= steps <= num_timesteps.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"steps={steps}: must be from 1 to num_timesteps={self.num_timesteps}")
        whole = [self.num_timesteps * (steps - i) // steps for i in range(steps + 1)]
        return torch.tensor(whole, dtype=torch.float32) / self.num_timesteps

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
        """One ancestral step from `level` to `next_level` (scalars, or shaped as the first dims of x). x [..., C] -> [..., C].

        The posterior of Ho et al., eqs 6 and 7, on the subsequence of steps (Nichol and Dhariwal, section 4), with its own variance
        (beta tilde). The last step, to level 0, adds no noise and returns the clean estimate.
        noise: standard normal, shaped as x. clip: keep the clean estimate inside [-clip, clip], for pixels.
        """
        alpha_bar, before = self._alpha_bar_at(level, x), self._alpha_bar_at(next_level, x)
        alpha = alpha_bar / before
        beta = 1 - alpha
        clean = self.clean_estimate(x, prediction, level)
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        mean = (before.sqrt() * beta * clean + alpha.sqrt() * (1 - before) * x) / (1 - alpha_bar)
        deviation = (beta * (1 - before) / (1 - alpha_bar)).sqrt()
        return (mean + deviation * noise).to(x.dtype)

    def clean_estimate(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The clean image that the prediction points at from x."""
        alpha_bar = self._alpha_bar_at(level, x)
        return ((x - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()).to(x.dtype)

    def _alpha_bar_at(self, levels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """alpha_bar at each level, float64, shaped to broadcast with `values`."""
        return beside(self.alpha_bar[(levels * self.num_timesteps).round().long()], values)
