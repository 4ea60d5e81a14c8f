"""What a config says of objectives, patchers and samplers reaches the part that computes it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fusiontrain.config.schema import ObjectiveConfig
from fusiontrain.generate.paint import paint
from fusiontrain.models.build import build_model
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.generation import BOI, EOI, TOKENIZER, lively_model
from fusiontrain.train.evaluate import paint_prompts
from fusiontrain.train.step import objective_weights

LINEAR = {"model.image": {"patcher": "linear"}}
TIMES = torch.tensor([0.1, 0.37, 0.9])
PAYLOAD = SimpleNamespace(timesteps=TIMES, max_timesteps=torch.tensor([1.0, 1.0, 0.5]))


def objective_of(**settings):
    return build_model(tiny_config({**LINEAR, **{f"objective.{key}": value for key, value in settings.items()}})).image_objective


def test_the_z_loss_has_its_weight_in_training_alone():
    config = tiny_config({"objective.z_loss": 0.3, **LINEAR})
    model, batch = lively_model(config), batch_of([document([256, 5, 6, BOI], ("image", 2, 2), [EOI, 7, 257])], config)
    logits = model.text_logits(batch)[batch.labels[: batch.modality_bounds[1]] >= 0]
    with torch.no_grad():
        plain, trained = (float(model.train(mode)(batch)["text"].sum) for mode in (False, True))
    assert trained - plain == pytest.approx(0.3 * float(logits.logsumexp(1).square().sum()), rel=1e-3) != 0


def test_the_time_shift_moves_the_draws():
    levels = objective_of(image="flow_matching", time_shift=3.0).levels(PAYLOAD)
    expected = [3 * t / (1 + 2 * t) * cap for t, cap in zip(TIMES.tolist(), (1, 1, 0.5), strict=True)]
    assert levels.tolist() == pytest.approx(expected, rel=1e-6)


def test_ddpm_has_as_many_levels_as_the_config_says():
    levels = objective_of(image="ddpm", num_timesteps=10).levels(PAYLOAD)
    assert (levels * 10).tolist() == pytest.approx((levels * 10).round().tolist(), abs=1e-5)
    assert not torch.allclose(levels, objective_of(image="ddpm", num_timesteps=1000).levels(PAYLOAD), atol=1e-3)


@pytest.mark.parametrize(("name", "target"), [("eps", (0, 1)), ("x0", (1, 0)), ("v", (-1, 1))])
def test_the_prediction_is_the_one_asked_for(name: str, target: tuple[int, int]):
    """In the middle of the angle, where both coefficients are sqrt(1/2): eps, x0, or the velocity (eps - x0) sqrt(1/2)."""
    objective = objective_of(image="ddpm", prediction=name, num_timesteps=1000)
    clean, noise, level = torch.full((1, 4), 2.0), torch.full((1, 4), 5.0), torch.tensor([0.5])
    scale = math.sqrt(0.5) if name == "v" else 1.0
    expected = (target[0] * 2.0 + target[1] * 5.0) * scale
    assert objective.target(clean, noise, level).flatten().tolist() == pytest.approx([expected] * 4, abs=0.05)


def test_every_objective_has_its_own_weight():
    assert objective_weights(ObjectiveConfig(text_weight=2.0, image_weight=3.0, speech_weight=4.0)) == {"text": 2.0, "image": 3.0, "speech": 4.0}


@pytest.mark.parametrize(("attention", "sees_later_patches"), [("causal", False), ("bidirectional", True)])
def test_patches_that_are_written_see_what_they_saw_in_training(attention: str, sees_later_patches: bool):
    config = tiny_config({"data.image": {"size": 8, "patch_size": 4, "attention": attention}, **LINEAR})
    model, values = lively_model(config), torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0))
    changed = values.clone()
    changed[0, 3] += 1
    first, second = (model.decode_image(x, torch.ones(1), (2, 2), model.new_cache(1, 4), commit=False)[0, 0] for x in (values, changed))
    assert torch.equal(first, second) != sees_later_patches


def test_pictures_of_a_run_are_sampled_as_its_config_says():
    sample = {"prompts": ["red", "blue"], "steps": 3, "guidance": 2.5, "sampler": "ddim", "ddim_eta": 0.7}
    config = tiny_config({"sample": sample, "seed": 4, **LINEAR})
    model = lively_model(config)
    asked = {"image": config.data.image, "steps": 3, "guidance": 2.5, "sampler": "ddim", "eta": 0.7, "seed": 4}
    found = paint_prompts(model, TOKENIZER, config)
    assert np.array_equal(found, paint(model, TOKENIZER, ["red", "blue"], **asked))
    for change in ({"steps": 2}, {"guidance": 1.0}, {"sampler": "euler"}, {"eta": 0.0}, {"seed": 5}):
        assert not np.array_equal(found, paint(model, TOKENIZER, ["red", "blue"], **{**asked, **change})), change
