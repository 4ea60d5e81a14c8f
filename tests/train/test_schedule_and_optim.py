"""Learning rate as a function of the step, and who decays."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fusiontrain.config.schema import OptimizerConfig
from fusiontrain.models.build import build_model
from fusiontrain.parallel.apply import parallelize
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.training import lmfusion_config, write_base
from fusiontrain.train.optim import build_optimizer, embedding_names, set_learning_rate
from fusiontrain.train.schedule import learning_rate
from fusiontrain.utils.errors import UserError


def test_warm_up_then_cosine_to_the_final_rate() -> None:
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.2, warmup_steps=4)
    rates = [learning_rate(step, config, 12) for step in range(1, 15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.6)  # half of the cosine
    assert rates[5] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 2 / 8)))
    assert rates[11] == pytest.approx(0.2) and rates[11:] == [rates[11]] * 3
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:12]))


def test_without_warm_up_and_with_nothing_but_warm_up() -> None:
    assert learning_rate(1, OptimizerConfig(learning_rate=1.0, final_learning_rate=0.0, warmup_steps=0), 2) == pytest.approx(0.5)
    assert learning_rate(3, OptimizerConfig(learning_rate=1.0, warmup_steps=4), 4) == 0.75


def groups(config, freeze_all: bool = False):
    model = build_model(config)
    embeddings = embedding_names(model)
    parameters = parallelize(model, model.plan(), config.parallel, None, torch.device("cpu"))
    if freeze_all:
        model.requires_grad_(False)
    optimizer = build_optimizer(parameters, embeddings, config.optimizer)
    names = {parameter: name for name, parameter in parameters.items()}
    return optimizer, {group["weight_decay"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}, parameters


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_nothing_else(tied: bool) -> None:
    config = tiny_config({"model.tie_embeddings": tied, "parallel.activation_checkpointing": "full"})
    _, by_decay, parameters = groups(config)
    assert by_decay[0.1] | by_decay[0.0] == set(parameters)
    assert {"blocks.1.feed_forward.up.shared.weight", "image.stem.weight"} <= by_decay[0.1]
    assert {"text.embedding.weight", "final_norm.shared.weight", "image.input.bias"} <= by_decay[0.0]
    assert ("text.head.weight" in by_decay[0.1]) == (not tied)
    assert all(parameters[name].ndim >= 2 for name in by_decay[0.1])


def test_frozen_parameters_are_not_in_the_optimizer(tmp_path) -> None:
    _, by_decay, parameters = groups(lmfusion_config(write_base(tmp_path)))
    chosen = by_decay[0.1] | by_decay[0.0]
    assert chosen == {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert chosen and not any(name.startswith("text.") or ".text." in name for name in chosen)


@pytest.mark.parametrize("separation", ["dense", "shallow", "deep"])
def test_what_ratio_zero_would_freeze_learns_at_its_ratio(tmp_path, separation: str) -> None:
    """LMFusion 5.1: what is not separated uses the text's rate. Freezing is asked which weights these are."""
    base = write_base(tmp_path)
    frozen = set(build_model(lmfusion_config(base, {"model.separation": separation})).plan().frozen)
    config = lmfusion_config(base, {"model.separation": separation, "model.freeze_text": False, "optimizer.text_learning_rate_ratio": 0.1})
    optimizer, _, parameters = groups(config)
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[id(parameter)] for name, parameter in parameters.items()} == {
        name: pytest.approx(0.05) if name in frozen else 0.5 for name in parameters
    }
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(parameter)] == (0.1 if parameter.ndim >= 2 and name != "text.embedding.weight" else 0) for name, parameter in parameters.items())


def test_a_step_moves_text_by_its_share(tmp_path) -> None:
    """The first step of AdamW without decay moves every weight by its learning rate."""
    config = lmfusion_config(write_base(tmp_path), {"model.freeze_text": False, "optimizer.text_learning_rate_ratio": 0.25, "optimizer.weight_decay": 0.0})
    optimizer, _, parameters = groups(config)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    moved = {name: float((before[name] - parameter).mean()) for name, parameter in parameters.items()}
    assert moved["blocks.0.attention.q.image.weight"] == pytest.approx(0.01, rel=1e-3)
    assert moved["image.input.weight"] == pytest.approx(0.01, rel=1e-3)
    assert moved["blocks.0.attention.q.text.weight"] == pytest.approx(0.0025, rel=1e-3)
    assert moved["text.embedding.weight"] == pytest.approx(0.0025, rel=1e-3)


def test_nothing_to_train_is_a_sentence() -> None:
    with pytest.raises(UserError, match="no parameter trains"):
        groups(tiny_config(), freeze_all=True)


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer, _, _ = groups(tiny_config())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
