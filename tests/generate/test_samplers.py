"""Samplers where the truth is known: images of independent normal numbers, for which the best prediction and the exact flow are formulas.

With `x_0 ~ N(m, c^2)` and `x = a x_0 + s eps`, the best guess of x_0 is affine in x, so every step is affine in x and in its noise: what a sampler
does to all images at once is found by asking it about three numbers, in float64.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from fusiontrain.generate.guidance import denoise, guide
from fusiontrain.generate.samplers import STEPS
from fusiontrain.objectives.ddpm import Ddpm
from fusiontrain.objectives.flow_matching import FlowMatching
from fusiontrain.objectives.gaussian_path import GaussianPath

MEAN, DEVIATION = 0.8, 0.3
PATHS = {"ddpm": Ddpm(1024), "flow": FlowMatching(1.0), "shifted flow": FlowMatching(3.0)}
EACH_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def by_hand(path: GaussianPath, level: torch.Tensor) -> tuple[float, float]:
    """(a, s) from the papers' formulas."""
    if isinstance(path, FlowMatching):
        return 1 - float(level), float(level)
    share = float(path.alpha_bar[round(float(level) * path.num_timesteps)])
    return math.sqrt(share), math.sqrt(1 - share)


def look(path: GaussianPath, x: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The posterior mean of the clean number given x, and the noise that goes with it."""
    a, s = by_hand(path, level)
    clean = MEAN + a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2) * (x - a * MEAN)
    return clean, (x - a * clean) / s


def one_step(sampler: str, path: GaussianPath, level: torch.Tensor, next_level: torch.Tensor, eta: float = 0.0) -> tuple[float, float, float]:
    """(offset, factor of x, factor of the noise) of a step."""

    x, noise = (torch.tensor(three, dtype=torch.float64).view(3, 1, 1) for three in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
    offset, with_x, with_noise = STEPS[sampler](path, partial(look, path), x, level, next_level, lambda: noise, eta).flatten().tolist()
    return offset, with_x - offset, with_noise - offset


def sampled(sampler: str, path: GaussianPath, steps: int, eta: float = 0.0) -> tuple[float, float]:
    """Mean and variance of what comes out when standard normal noise goes in."""
    mean, variance = 0.0, 1.0
    levels = path.sampling_levels(steps)
    for i in range(steps):
        offset, factor, noise = one_step(sampler, path, levels[i], levels[i + 1], eta)
        mean, variance = offset + factor * mean, factor**2 * variance + noise**2
    return mean, variance


@EACH_PATH
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("euler", 0.0), ("heun", 0.0)])
def test_every_sampler_converges_to_the_mean_and_variance_of_the_images(path: GaussianPath, sampler: str, eta: float) -> None:
    errors = []
    for steps in (64, 256):
        mean, variance = sampled(sampler, path, steps, eta)
        errors.append((abs(mean - MEAN), abs(math.sqrt(variance) - DEVIATION)))
    assert all(error < 0.015 for error in errors[1]), errors
    assert errors[1][1] < 0.4 * errors[0][1], errors


def flow_error(sampler: str, path: GaussianPath, steps: int, end: float) -> float:
    """How far a number is, at level `end`, from where the exact flow takes it, which keeps its place in units of deviations."""
    levels, x = path.sampling_levels(steps), 0.7

    def place(x: float, level: torch.Tensor) -> float:
        a, s = by_hand(path, level)
        return (x - a * MEAN) / math.sqrt(a**2 * DEVIATION**2 + s**2)

    first = place(x, levels[0])
    for i in range(steps):
        if levels[i] > end:
            offset, factor, _ = one_step(sampler, path, levels[i], levels[i + 1])
            x, last = offset + factor * x, levels[i + 1]
    assert last == end
    return abs(place(x, last) - first)


@pytest.mark.parametrize(("path", "end"), [(Ddpm(1024), 0.25), (FlowMatching(1.0), 0.0), (FlowMatching(3.0), 0.0)], ids=PATHS)
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(path: GaussianPath, end: float, sampler: str, order: int) -> None:
    """DDPM stops before the end, where the offset of the cosine schedule makes the angle a root of the level."""
    errors = [flow_error(sampler, path, steps, end) for steps in (32, 64, 128)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2), errors


@pytest.mark.parametrize(("level", "next_level"), [(1.0, 0.996), (0.6, 0.5), (0.3, 0.299), (0.001, 0.0)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_ancestral_step_is_the_posterior_of_ho(sampler: str, level: float, next_level: float) -> None:
    """Eqs 6 and 7 of Ho et al., with the alphas of a subsequence; ddim is the same at eta 1."""
    path = Ddpm(1000)
    now, then = (float(path.alpha_bar[round(at * 1000)]) for at in (level, next_level))
    beta = 1 - now / then
    x, eps, noise = 0.7, -1.3, 0.4
    clean = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    mean = math.sqrt(then) * beta / (1 - now) * clean + math.sqrt(1 - beta) * (1 - then) / (1 - now) * x
    deviation = math.sqrt((1 - then) / (1 - now) * beta)
    number = partial(torch.full, (1, 1, 1), dtype=torch.float64)
    out = STEPS[sampler](
        path, lambda x, at: (number(clean), number(eps)), number(x), torch.tensor(level), torch.tensor(next_level), lambda: number(noise), 1.0
    )
    assert float(out) == pytest.approx(mean + deviation * noise, rel=1e-7)


def test_ddim_without_noise_is_eq_12_of_song() -> None:
    path, level, next_level = Ddpm(1000), torch.tensor(0.6), torch.tensor(0.5)
    now, then = (float(path.alpha_bar[round(at * 1000)]) for at in (0.6, 0.5))
    number = partial(torch.full, (1, 1, 1), dtype=torch.float64)
    clean = (0.7 - math.sqrt(1 - now) * -1.3) / math.sqrt(now)
    out = STEPS["ddim"](path, lambda x, at: (number(clean), number(-1.3)), number(0.7), level, next_level, lambda: pytest.fail("drawn"), 0.0)
    assert float(out) == pytest.approx(math.sqrt(then) * clean + math.sqrt(1 - then) * -1.3)


@pytest.mark.parametrize("path", [FlowMatching(1.0), FlowMatching(3.0)], ids=["flow", "shifted flow"])
def test_on_a_straight_line_ddim_is_euler(path: GaussianPath) -> None:
    levels = path.sampling_levels(5)
    for i in range(5):
        assert one_step("ddim", path, levels[i], levels[i + 1]) == pytest.approx(one_step("euler", path, levels[i], levels[i + 1]))


@pytest.mark.parametrize("path", [Ddpm(1000), FlowMatching(1.0)], ids=["ddpm", "flow"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "heun"])
def test_one_step_from_pure_noise_is_the_mean_of_all_images(path: GaussianPath, sampler: str) -> None:
    """Noise tells nothing, so the best guess is the mean; Euler and Heun on the circle of DDPM go a quarter of its length along the tangent."""
    level, end = path.sampling_levels(1)
    offset, factor, _ = one_step(sampler, path, level, end)
    if isinstance(path, Ddpm) and sampler in ("euler", "heun"):
        assert offset == pytest.approx(MEAN * math.pi / 2, abs=1e-3) and factor == pytest.approx(1, abs=1e-3)
    else:
        assert offset == pytest.approx(MEAN, abs=1e-4) and factor == pytest.approx(0, abs=1e-4)


def test_guidance_is_the_same_in_every_parametrisation() -> None:
    """Predictions are affine in one another at a given x, so it does not matter which one is guided."""
    x, with_text, without = (torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    level = torch.tensor(0.6)
    guided = []
    for path in (Ddpm(1000), Ddpm(1000, "v"), Ddpm(1000, "x0")):
        a, s = path.coefficients(level)
        predictions = [path.target(clean, ((x - a * clean) / s).float(), level) for clean in (with_text, without)]
        guided.append(path.estimates(x, guide(*predictions, 4.0), level)[0])
    expected = (without + 4.0 * (with_text - without)).double()
    for found in guided:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("path", [Ddpm(100), FlowMatching(1.0)], ids=["ddpm", "flow"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "heun"])
def test_clipping_holds_the_clean_image_that_every_sampler_sees(path: GaussianPath, sampler: str) -> None:
    """A model that points far outside, whose last look is what the last step of ddpm, ddim and Euler on a line returns."""
    free, held = (denoise(lambda x, levels: -3 * x, path, [1], 4, (2, 2), 8, torch.device("cpu"), sampler=sampler, clip=clip) for clip in (None, 1.0))
    assert free.abs().max() > 2
    assert held.abs().max() <= 1.2
