"""From noise to an image: one step of each sampler, for any path between the two.

Every sampler asks `look` what the model makes of x at a level, and is told the clean image and the noise that it sees there.

| sampler | step | predictions |
|---|---|---|
| ddpm | ancestral: drawn from the posterior of Ho et al. (arXiv 2006.11239, eqs 6 and 7), with its own variance (beta tilde) | 1 |
| ddim | Song et al. (arXiv 2010.02502, eq 12): eta times the deviation of ddpm; 0 draws nothing | 1 |
| euler | along the velocity, by the path's clock: t of rectified flow, the angle of DDPM | 1 |
| heun | along the mean of the velocities at both ends, an error of second order; the last step is Euler's | 2 |

On rectified flow, ddim with eta 0 is euler. `auto` is what a path is usually sampled with: ddpm for DDPM, euler for rectified flow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from fusiontrain.objectives.ddpm import Ddpm
from fusiontrain.objectives.gaussian_path import GaussianPath, beside
from fusiontrain.utils.errors import UserError

Look = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(x [B, N, C], level []) -> the clean image and the noise seen there, [B, N, C] float64 each."""

Draw = Callable[[], torch.Tensor]
"""Standard normal noise of this step, shaped as x; not asked for by a step that draws nothing."""


class Step(Protocol):
    """From `level` to the lower `next_level` (scalars): x [B, N, C] -> [B, N, C] float64. At level 0 nothing is drawn."""

    def __call__(
        self, path: GaussianPath, look: Look, x: torch.Tensor, level: torch.Tensor, next_level: torch.Tensor, draw: Draw, eta: float
    ) -> torch.Tensor: ...


def ddim_step(
    path: GaussianPath, look: Look, x: torch.Tensor, level: torch.Tensor, next_level: torch.Tensor, draw: Draw, eta: float
) -> torch.Tensor:
    """The variance of the posterior of x at `next_level`, given x at `level` and the clean image, is that of a Markov chain on any path."""
    clean, noise = look(x, level)
    (a, s), (next_a, next_s) = path.beside(level, x), path.beside(next_level, x)
    posterior = (next_s / s).square() * (s.square() - (a / next_a * next_s).square())
    variance = eta**2 * posterior
    mean = next_a * clean + (next_s.square() - variance).clamp(min=0).sqrt() * noise
    return mean + variance.sqrt() * draw() if eta else mean


def ddpm_step(
    path: GaussianPath, look: Look, x: torch.Tensor, level: torch.Tensor, next_level: torch.Tensor, draw: Draw, eta: float
) -> torch.Tensor:
    return ddim_step(path, look, x, level, next_level, draw, eta=1.0)


def euler_step(
    path: GaussianPath, look: Look, x: torch.Tensor, level: torch.Tensor, next_level: torch.Tensor, draw: Draw, eta: float
) -> torch.Tensor:
    time = beside(path.clock(next_level) - path.clock(level), x)
    return x + time * path.velocity(*look(x, level), level)


def heun_step(
    path: GaussianPath, look: Look, x: torch.Tensor, level: torch.Tensor, next_level: torch.Tensor, draw: Draw, eta: float
) -> torch.Tensor:
    """Along Euler's step to look, and from where it began along the mean of both looks."""
    time = beside(path.clock(next_level) - path.clock(level), x)
    velocity = path.velocity(*look(x, level), level)
    ahead = x + time * velocity
    if next_level == 0:  # no model is asked about clean images, where there is no noise to see
        return ahead
    return x + time * (velocity + path.velocity(*look(ahead, next_level), next_level)) / 2


STEPS: dict[str, Step] = {"ddpm": ddpm_step, "ddim": ddim_step, "euler": euler_step, "heun": heun_step}


def sampler_name(name: str, path: GaussianPath) -> str:
    """That name, or for `auto` what the path is usually sampled with."""
    return name if name != "auto" else "ddpm" if isinstance(path, Ddpm) else "euler"


def choose_step(name: str, path: GaussianPath) -> Step:
    """The step of that name; `auto` asks the path. Raises UserError for another name."""
    name = sampler_name(name, path)
    if name not in STEPS:
        raise UserError(f"sampler {name!r}: must be auto or one of {', '.join(STEPS)}")
    return STEPS[name]
