"""DeepSpeed's ZeRO beside FSDP2: the same losses, gradient norms, weights and optimizer states from the same steps, and the same checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.deepspeed import start_zero
from fusiontrain.parallel.mesh import build_mesh, process_group, read_ranks
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


def train(config: Config, micro_batches: int = 2) -> tuple[list[StepResult], dict[str, torch.Tensor | None]]:
    """A few steps with either engine -> the results, and every tensor that a checkpoint of it would hold, gathered."""
    ranks = read_ranks() if torch.distributed.is_initialized() else read_ranks({})
    with process_group(ranks, config.parallel):
        model = build_model(config)
        wake(model)
        plan, embeddings = model.plan(), embedding_names(model)
        parameters = parallelize(model, plan, config.parallel, build_mesh(config.parallel, ranks), ranks.device)
        optimizer = build_optimizer(parameters, embeddings, config.optimizer)
        weights = model_tensors(model, parameters, include_frozen=True)
        zero = None
        if config.parallel.engine == "deepspeed":
            zero = start_zero(model, plan, parameters, optimizer, config.parallel, CLIP_NORM, ranks.device)
        tensors = {"model": weights, "optimizer": optimizer_tensors(optimizer, parameters)} if zero is None else zero.tensors(weights)
        results = []
        for step in range(STEPS):
            batches = split(make_sequences(KINDS, config, step), config, ranks.rank, ranks.world_size, micro_batches)
            set_learning_rate(optimizer, 1e-3 * (1 + step % 3))
            counts = global_counts(batches)
            results.append(train_step(model, optimizer, batches, counts, WEIGHTS, CLIP_NORM, ranks.world_size, ranks.device, zero))
        gathered = full_tensors({f"{group}/{name}": tensor for group, part in tensors.items() for name, tensor in part.items()})
        if zero is not None:
            zero.close()
        return results, gathered


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
    for got, expected in zip(results, wanted[recipe][0], strict=True):
        assert got.losses == pytest.approx(expected.losses, rel=1e-5)
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert results[0].grad_norm > 2 * CLIP_NORM, "or clipping is not tested"
    assert tensors.keys() == wanted[recipe][1].keys()
    for name, tensor in wanted[recipe][1].items():
        torch.testing.assert_close(tensors[name], tensor, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
