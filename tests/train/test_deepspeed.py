"""DeepSpeed's ZeRO beside FSDP2: the same losses, gradient norms, weights and optimizer states from the same steps, and the same checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.deepspeed import start_zero
from fusiontrain.parallel.mesh import Ranks, build_mesh, process_group, read_ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.training import full_tensors, lmfusion_config, make_sequences, split, write_base
from fusiontrain.train.optim import build_optimizer, embedding_names, set_learning_rate
from fusiontrain.train.state import model_tensors, optimizer_tensors
from fusiontrain.train.step import StepResult, global_counts, train_step

pytest.importorskip("deepspeed")

WEIGHTS = {"text": 1.0, "image": 5.0}
CLIP_NORM = 0.5
STEPS = 5
KINDS = ("mixed", "text", "image", "mixed", "text", "text", "text", "mixed")
"""Of one step: with two ranks and two micro-batches, the second rank's first micro-batch has no image and targets are uneven."""


def wake(model: torch.nn.Module) -> None:
    """The image output starts at zero, which hides gradients behind it: give every trainable weight a value of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


class Run:
    """A tiny model under the engine of `config`, and its steps."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks, self.model = config, ranks, build_model(config)
        wake(self.model)
        plan, embeddings = self.model.plan(), embedding_names(self.model)
        parameters = parallelize(self.model, plan, config.parallel, build_mesh(config.parallel, ranks), ranks.device)
        self.optimizer = build_optimizer(parameters, embeddings, config.optimizer)
        weights = model_tensors(self.model, parameters, include_frozen=True)
        self.zero = None
        if config.parallel.engine == "deepspeed":
            self.zero = start_zero(self.model, plan, parameters, self.optimizer, config.parallel, CLIP_NORM, ranks.device)
            groups = self.zero.tensors(weights)
        else:
            groups = {"model": weights, "optimizer": optimizer_tensors(self.optimizer, parameters)}
        self.tensors = {f"{group}/{name}": tensor for group, part in groups.items() for name, tensor in part.items()}

    def step(self, number: int, micro_batches: int, spoiled: bool = False) -> StepResult:
        """One step; `spoiled` makes this rank's last picture infinite."""
        batches = split(make_sequences(KINDS, self.config, number), self.config, self.ranks.rank, self.ranks.world_size, micro_batches)
        if spoiled:
            batches[-1].payloads["image"].values[-1, 0] = math.inf
        set_learning_rate(self.optimizer, 1e-3 * (1 + number % 3))
        size, counts = self.ranks.world_size, global_counts(batches)
        return train_step(self.model, self.optimizer, batches, counts, WEIGHTS, CLIP_NORM, size, self.ranks.device, zero=self.zero)

    def close(self) -> dict[str, torch.Tensor | None]:
        """Every tensor that a checkpoint would hold, gathered."""
        gathered = full_tensors(self.tensors)
        if self.zero is not None:
            self.zero.close()
        return gathered


def train(config: Config, micro_batches: int = 2, spoiled: int | None = None) -> tuple[list[StepResult], dict[str, torch.Tensor | None]]:
    """A few steps -> their results and the tensors at the end. The step of number `spoiled` has an infinite picture on the last rank."""
    ranks = read_ranks() if torch.distributed.is_initialized() else read_ranks({})
    with process_group(ranks, config.parallel):
        run = Run(config, ranks)
        last = ranks.rank == ranks.world_size - 1
        results = [run.step(number, micro_batches, last and number == spoiled) for number in range(STEPS)]
        return results, run.close()


def run(function: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """What the first rank returns. DeepSpeed numbers modules per process and compares the numbers, so the ranks of the pool must have
    started it equally often: one rank runs here."""
    return shared_pool().run(function, world_size, *args)[0] if world_size > 1 else function(*args)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


def make_config(recipe: str, base: str, overrides: dict) -> Config:
    return lmfusion_config(base, overrides) if recipe == "lmfusion" else tiny_config(overrides)


@pytest.fixture(scope="module")
def wanted(base: str) -> dict[str, tuple]:
    """Both recipes in one process, by torch alone."""
    return {recipe: train(make_config(recipe, base, {}), 1) for recipe in ("lmfusion", "transfusion")}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recipe", ["lmfusion", "transfusion"])
def test_every_stage_takes_the_steps_of_one_process(recipe: str, stage: int, world_size: int, base: str, wanted: dict[str, tuple]) -> None:
    config = make_config(recipe, base, {"parallel.engine": "deepspeed", "parallel.zero_stage": stage})
    results, tensors = run(train, world_size, config)
    assert results[0].grad_norm > 2 * CLIP_NORM, "or clipping is not tested"
    assert_same((results, tensors), wanted[recipe])


def test_what_deepspeed_replaces_in_torch_is_given_back(base: str) -> None:
    """Its linear layer for stage 3 computes and keeps other things than torch's, for all models of the process."""
    linear = torch.nn.functional.linear
    train(make_config("lmfusion", base, {"parallel.engine": "deepspeed", "parallel.zero_stage": 3}))
    assert torch.nn.functional.linear is linear and "deepspeed" not in linear.__module__


def assert_same(got: tuple, wanted: tuple) -> None:
    for result, expected in zip(got[0], wanted[0], strict=True):
        assert result.losses == pytest.approx(expected.losses, rel=1e-5, nan_ok=True)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert got[1].keys() == wanted[1].keys()
    for name, tensor in wanted[1].items():
        torch.testing.assert_close(got[1][name], tensor, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stage", [2, 3])
def test_with_recomputation_in_bfloat16(stage: int, base: str) -> None:
    """The same roundings as FSDP2's, from masters with all their digits; frozen weights may have been rounded to what they compute in."""
    options = {"parallel.activation_checkpointing": "full", "parallel.precision": "bfloat16"}
    results, tensors = train(make_config("lmfusion", base, options))
    config = make_config("lmfusion", base, {**options, "parallel.engine": "deepspeed", "parallel.zero_stage": stage})
    frozen = {f"model/{name}" for name in build_model(config).plan().frozen}
    wanted = {name: tensor.bfloat16().float() if name in frozen else tensor for name, tensor in tensors.items()}
    got = train(config)
    assert_same((got[0], {name: tensor.float() for name, tensor in got[1].items()}), (results, wanted))


@pytest.mark.parametrize("stage", [2, 3])
def test_text_learns_at_its_own_rate(stage: int, base: str) -> None:
    rates = {"model.freeze_text": False, "optimizer.text_learning_rate_ratio": 0.1}
    config = make_config("lmfusion", base, {**rates, "parallel.engine": "deepspeed", "parallel.zero_stage": stage})
    assert_same(run(train, 2, config), train(make_config("lmfusion", base, rates), 1))


@pytest.mark.parametrize(("stage", "world_size"), [(1, 1), (2, 2), (3, 2)])
def test_a_step_that_is_not_finite_updates_nothing_on_any_rank(stage: int, world_size: int, base: str) -> None:
    """The steps around it are those of a run without it, but for their learning rates and samples: the state counts the others alone."""
    config = make_config("lmfusion", base, {"parallel.engine": "deepspeed", "parallel.zero_stage": stage})
    results, tensors = run(train, world_size, config, 2, 1)
    expected, wanted = train_without(make_config("lmfusion", base, {}), 1)
    assert [result.finite for result in results] == [True, False, True, True, True]
    assert_same((results[:1] + results[2:], tensors), (expected, wanted))


def train_without(config: Config, left_out: int) -> tuple[list[StepResult], dict[str, torch.Tensor | None]]:
    """The steps of `train` in one process by torch alone, but for one of them."""
    alone = Run(config, read_ranks({}))
    return [alone.step(number, 1) for number in range(STEPS) if number != left_out], alone.close()


def test_an_infinite_loss_updates_nothing_even_where_its_gradient_is_finite(base: str) -> None:
    config = make_config("lmfusion", base, {"parallel.engine": "deepspeed"})
    ranks = read_ranks({})
    with process_group(ranks, config.parallel):
        run = Run(config, ranks)
        assert run.zero is not None
        before = full_tensors(run.tensors)
        terms = run.zero.forward(split(make_sequences(["mixed"], config), config, 0, 1, 1)[0])
        run.zero.backward(terms["image"].sum + math.inf, True)
        assert not math.isfinite(run.zero.step())
        after = run.close()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
