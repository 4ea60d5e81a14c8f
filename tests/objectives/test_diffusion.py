"""DDPM and flow matching against loops written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontrain.objectives.ddpm import Ddpm, cosine_alpha_bar
from fusiontrain.objectives.flow_matching import FlowMatching
from fusiontrain.types import Payload

Objective = Ddpm | FlowMatching
ALL = {"eps": Ddpm(1000), "v": Ddpm(1000, "v"), "x0": Ddpm(1000, "x0"), "flow": FlowMatching(3.0)}
EACH = pytest.mark.parametrize("objective", ALL.values(), ids=ALL)
GRIDS = ((2, 3), (1, 1), (2, 2))


def payload(
    draws: tuple[float, ...] = (0.2, 0.5, 0.9),
    caps: tuple[float, ...] = (1.0, 1.0, 1.0),
    targets: tuple[bool, ...] = (True, True, True),
    grids: tuple[tuple[int, int], ...] = GRIDS,
    channels: int = 4,
) -> Payload:
    sizes = torch.tensor([rows * columns for rows, columns in grids], dtype=torch.int64)
    return Payload(
        values=normal(int(sizes.sum()), channels, seed=1),
        image_ids=torch.repeat_interleave(sizes),
        timesteps=torch.tensor(draws, dtype=torch.float32),
        max_timesteps=torch.tensor(caps, dtype=torch.float32),
        noise_keys=torch.arange(len(grids)),
        is_target=torch.tensor(targets, dtype=torch.bool),
        grids=grids,
    )


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alpha_bar_by_loop(num_timesteps: int) -> list[float]:
    """Nichol and Dhariwal, section 3.2 (eq 17), betas clipped at 0.999."""

    def f(t: int) -> float:
        return math.cos((t / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    products = [1.0]
    for t in range(1, num_timesteps + 1):
        products.append(products[-1] * (1 - min(1 - (f(t) / f(0)) / (f(t - 1) / f(0)), 0.999)))
    return products


@pytest.mark.parametrize("num_timesteps", [2, 10, 1000])
def test_cosine_schedule(num_timesteps: int) -> None:
    actual = cosine_alpha_bar(num_timesteps)
    expected = torch.tensor(alpha_bar_by_loop(num_timesteps), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    assert (actual[1:] < actual[:-1]).all() and actual[-1] > 0


def test_schedule_of_the_paper() -> None:
    """Transfusion 2.2: the root of alpha_bar is about cos(pi / 2 * t / T)."""
    t = torch.arange(1001, dtype=torch.float64) / 1000
    assert (cosine_alpha_bar(1000).sqrt() - torch.cos(math.pi / 2 * t)).abs().max() < 0.02


def test_ddpm_levels_are_whole_steps_under_the_cap() -> None:
    objective = Ddpm(10)
    for cap, largest in ((1.0, 10), (0.5, 5), (0.3, 3), (0.0, 0), (0.01, 0)):
        draws = [i / 1000 for i in range(1000)] + [1.0]  # 1.0: what a draw just below it becomes in float32
        grids = ((1, 1),) * len(draws)
        levels = objective.levels(payload(tuple(draws), (cap,) * len(draws), (True,) * len(draws), grids))
        assert levels.dtype == torch.float32
        steps = (levels * 10).round().int().tolist()
        torch.testing.assert_close(levels, torch.tensor(steps) / 10)
        if largest == 0:
            assert set(steps) == {0}
            continue
        counts = [steps.count(step) for step in range(1, largest + 1)]
        assert sum(counts) == len(steps) and max(counts) - min(counts) <= 2


def test_flow_levels_are_shifted_then_capped() -> None:
    levels = FlowMatching(3.0).levels(payload((0.0, 0.5, 0.9), (1.0, 0.5, 0.0)))
    torch.testing.assert_close(levels, torch.tensor([0.0, 0.75 * 0.5, 0.0]))
    torch.testing.assert_close(FlowMatching(1.0).levels(payload()), torch.tensor([0.2, 0.5, 0.9]))


@EACH
def test_corrupt_and_target_equal_the_formulas(objective: Objective) -> None:
    batch = payload()
    noise, levels = normal(11, 4, seed=2), objective.levels(batch)
    noised = objective.corrupt(batch.values, noise, levels[batch.image_ids])
    target = objective.target(batch.values, noise, levels[batch.image_ids])
    assert noised.dtype == torch.float32
    products = alpha_bar_by_loop(1000)
    for token in range(11):
        level = float(levels[batch.image_ids[token]])
        for c in range(4):
            x, eps = float(batch.values[token, c]), float(noise[token, c])
            if isinstance(objective, Ddpm):
                share = products[round(level * 1000)]
                expected = math.sqrt(share) * x + math.sqrt(1 - share) * eps
                aim = {"eps": eps, "x0": x, "v": math.sqrt(share) * eps - math.sqrt(1 - share) * x}[objective.prediction]
            else:
                expected, aim = (1 - level) * x + level * eps, eps - x
            assert math.isclose(float(noised[token, c]), expected, abs_tol=1e-6)
            assert math.isclose(float(target[token, c]), aim, abs_tol=1e-6)


@EACH
def test_level_zero_is_the_clean_image(objective: Objective) -> None:
    batch = payload(caps=(0.0, 0.0, 0.0))
    levels = objective.levels(batch)
    assert torch.equal(objective.corrupt(batch.values, normal(11, 4, seed=2), levels[batch.image_ids]), batch.values)


@EACH
@pytest.mark.parametrize("targets", [(True, True, True), (True, False, True), (False, False, False)])
def test_loss_equals_loops(objective: Objective, targets: tuple[bool, ...]) -> None:
    batch = payload(targets=targets)
    noise, levels = normal(11, 4, seed=2), objective.levels(batch)
    prediction = normal(11, 4, seed=3).requires_grad_()
    term = objective.loss(prediction, batch, noise, levels)
    aim = objective.target(batch.values, noise, levels[batch.image_ids])
    total = 0.0
    expected_grad = torch.zeros(11, 4)
    for image in range(3):
        tokens = [token for token in range(11) if batch.image_ids[token] == image]
        if targets[image]:
            size = len(tokens) * 4
            total += sum(float((prediction - aim).detach()[t, c]) ** 2 for t in tokens for c in range(4)) / size
            for token in tokens:
                expected_grad[token] = 2 * (prediction - aim)[token].detach() / size
    assert term.sum.dtype == torch.float32 and term.count.dtype == torch.int64
    assert math.isclose(float(term.sum.detach()), total, rel_tol=1e-5, abs_tol=1e-9)
    assert int(term.count) == sum(targets)
    (grad,) = torch.autograd.grad(term.sum, prediction)
    torch.testing.assert_close(grad, expected_grad)


@EACH
def test_loss_of_bfloat16_predictions_is_float32(objective: Objective) -> None:
    batch, noise = payload(), normal(11, 4, seed=2)
    levels = objective.levels(batch)
    rough = normal(11, 4, seed=3).bfloat16()
    assert torch.equal(objective.loss(rough, batch, noise, levels).sum, objective.loss(rough.float(), batch, noise, levels).sum)


@EACH
def test_no_images(objective: Objective) -> None:
    batch = payload((), (), (), ())
    prediction = torch.zeros(0, 4, requires_grad=True)
    levels = objective.levels(batch)
    assert levels.shape == (0,)
    assert objective.corrupt(batch.values, batch.values, levels[batch.image_ids]).shape == (0, 4)
    term = objective.loss(prediction, batch, batch.values, levels)
    assert term.sum == 0 and term.count == 0
    assert torch.autograd.grad(term.sum, prediction)[0].shape == (0, 4)


@EACH
def test_loss_does_not_depend_on_how_images_are_batched(objective: Objective) -> None:
    batch, noise, prediction = payload(), normal(11, 4, seed=2), normal(11, 4, seed=3)
    whole = objective.loss(prediction, batch, noise, objective.levels(batch))
    parts = []
    for image in range(3):
        rows = batch.image_ids == image
        part = payload((float(batch.timesteps[image]),), (1.0,), (True,), (GRIDS[image],))
        part = Payload(**{**part.__dict__, "values": batch.values[rows]})
        parts.append(objective.loss(prediction[rows], part, noise[rows], objective.levels(part)).sum)
    torch.testing.assert_close(sum(parts), whole.sum)


@EACH
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_sampling_levels_fall_from_one_to_zero(objective: Objective, steps: int) -> None:
    levels = objective.sampling_levels(steps)
    assert levels.shape == (steps + 1,) and levels.dtype == torch.float32
    assert levels[0] == 1 and levels[-1] == 0
    assert (levels[1:] < levels[:-1]).all()


def test_sampling_levels_of_each() -> None:
    torch.testing.assert_close(FlowMatching(3.0).sampling_levels(2), torch.tensor([1.0, 0.75, 0.0]))
    assert (Ddpm(1000).sampling_levels(1000) * 1000).round().tolist() == list(range(1000, -1, -1))
    assert (Ddpm(10).sampling_levels(4) * 10).round().tolist() == [10, 7, 5, 2, 0]


@pytest.mark.parametrize(("objective", "steps"), [(Ddpm(10), 11), (Ddpm(10), 0), (FlowMatching(1.0), 0)])
def test_impossible_numbers_of_steps_are_refused(objective: Objective, steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps={steps}"):
        objective.sampling_levels(steps)


@EACH
def test_estimates_invert_corrupt_and_target(objective: Objective) -> None:
    clean, noise, level = normal(3, 4, seed=1).double(), normal(3, 4, seed=2).double(), torch.tensor([0.1, 0.5, 0.9])
    noised = objective.corrupt(clean, noise, level)
    found = objective.estimates(noised, objective.target(clean, noise, level), level)
    torch.testing.assert_close(found, (clean, noise), rtol=0, atol=1e-6)


@EACH
def test_velocity_is_the_derivative_by_the_clock(objective: Objective) -> None:
    """The path a x_0 + s eps, a small difference of levels on either side."""
    clean, noise, level, step = normal(3, 4, seed=1).double(), normal(3, 4, seed=2).double(), torch.tensor(0.5), torch.tensor(0.001)
    ahead, behind = (objective.corrupt(clean, noise, level + sign * step) for sign in (1, -1))
    slope = (ahead - behind) / (objective.clock(level + step) - objective.clock(level - step))
    torch.testing.assert_close(slope, objective.velocity(clean, noise, level), rtol=0, atol=1e-5)


@EACH
def test_what_a_level_has_for_all_images_it_has_for_each(objective: Objective) -> None:
    x, prediction, levels = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2), torch.tensor([0.9, 0.4])
    together = objective.estimates(x, prediction, levels)
    for i in range(2):
        alone = objective.estimates(x[i], prediction[i], levels[i])
        torch.testing.assert_close(tuple(part[i] for part in together), alone)


def best_linear_prediction(objective: Ddpm, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """What least squares makes of x for the objective's target, [n, 1]: the minimiser of its loss among affine models."""
    x = objective.corrupt(clean, noise, level)
    features = torch.cat([x, torch.ones_like(x)], dim=1)
    return features @ torch.linalg.lstsq(features, objective.target(clean, noise, level)).solution


@pytest.mark.parametrize("level", [0.05, 0.5, 0.95])
def test_eps_v_and_x0_have_the_same_minimiser_and_weights_as_stated(level: float) -> None:
    """Fitted to the same draws, all point at the same clean image; an error there costs the SNR, the SNR + 1 and 1."""
    clean, noise = 0.7 + 0.4 * normal(500, 1, seed=1).double(), normal(500, 1, seed=2).double()
    at = torch.tensor(level)
    x = Ddpm(1000).corrupt(clean, noise, at)
    share = alpha_bar_by_loop(1000)[round(level * 1000)]
    snr = share / (1 - share)
    found = {}
    for name, weight in (("eps", snr), ("v", snr + 1), ("x0", 1.0)):
        objective = Ddpm(1000, name)
        prediction = best_linear_prediction(objective, clean, noise, at)
        found[name], _ = objective.estimates(x, prediction, at)
        error = (objective.target(clean, noise, at) - prediction).square().mean()
        assert float(error) == pytest.approx(weight * float((clean - found[name]).square().mean()), rel=1e-6)
    torch.testing.assert_close(found["v"], found["x0"], rtol=0, atol=1e-8)
    torch.testing.assert_close(found["eps"], found["x0"], rtol=0, atol=1e-8)
