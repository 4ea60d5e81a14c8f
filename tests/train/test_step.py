"""Law 2: however one step's sequences are spread over ranks and micro-batches, loss and gradients are those of one big batch."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.mesh import build_mesh, process_group, read_ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.training import full_tensors, lmfusion_config, make_sequences, split, write_base
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import StepResult, accumulate_gradients, global_counts, train_step

WEIGHTS = {"text": 1.0, "image": 5.0}


def wake(model: torch.nn.Module) -> None:
    """The image output starts at zero, which hides gradients behind it: give every trainable weight a value of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def build(config: Config):
    ranks = read_ranks({}) if not torch.distributed.is_initialized() else read_ranks()
    model = build_model(config)
    wake(model)
    embeddings = embedding_names(model)
    parameters = parallelize(model, model.plan(), config.parallel, build_mesh(config.parallel, ranks), ranks.device)
    return ranks, model, parameters, build_optimizer(parameters, embeddings, config.optimizer)


def gradients(
    config: Config, kinds: list[str], micro_batches: int, weights: dict[str, float] = WEIGHTS
) -> tuple[list[float], dict[str, torch.Tensor | None]]:
    """Loss sums of all ranks, and the gradient of every parameter, after one step's forwards and backwards."""
    ranks, model, parameters, _ = build(config)
    batches = split(make_sequences(kinds, config), config, ranks.rank, ranks.world_size, micro_batches)
    counts = global_counts(batches)
    sums = accumulate_gradients(model, batches, weights, counts.targets, ranks.world_size, ranks.device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums.tolist(), full_tensors({name: parameter.grad for name, parameter in parameters.items()})


def two_steps(config: Config, kinds: list[str]) -> tuple[list[StepResult], dict[str, torch.Tensor | None]]:
    ranks, model, parameters, optimizer = build(config)
    results = []
    for step in range(2):
        batches = split(make_sequences(kinds, config, step), config, ranks.rank, ranks.world_size, 1)
        counts = global_counts(batches)
        results.append(train_step(model, optimizer, batches, counts, WEIGHTS, 1.0, ranks.world_size, ranks.device))
    return results, full_tensors(parameters)


def assert_same(got: tuple, wanted: tuple, tolerance: float = 2e-6) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=1e-5)
    assert got[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        if value is None:
            assert got[1][name] is None, name
        else:
            torch.testing.assert_close(got[1][name], value, atol=tolerance, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "kinds",
    [
        ["mixed", "mixed", "mixed", "mixed"],
        ["mixed", "mixed", "text", "text"],  # the second rank has no image
        ["text", "text", "text", "text"],  # nobody has
        ["mixed", "mixed", "image", "image"],  # the second rank has no text label
        ["image", "image", "image", "image"],
        ["empty", "empty", "mixed", "text"],  # the first rank has padding alone
        ["mixed", "text", "text", "mixed"],  # one rank ends with what is frozen, the other begins with it
    ],
    ids=lambda kinds: "-".join(kinds),
)
@pytest.mark.parametrize("recipe", ["lmfusion", "transfusion"])
def test_ranks_and_accumulation_change_nothing(recipe: str, kinds: list[str], base: str) -> None:
    config = lmfusion_config(base) if recipe == "lmfusion" else tiny_config()
    whole = gradients(config, kinds, 1)
    assert_same(gradients(config, kinds, 4), whole)
    for rank, answer in enumerate(shared_pool().run(gradients, 2, config, kinds, 1 + (recipe == "lmfusion"))):
        assert_same(answer, whole), rank
    trained = [gradient for gradient in whole[1].values() if gradient is not None]
    assert trained, "nothing trains"
    has_signal = recipe == "transfusion" or "image" in "".join(kinds) or "mixed" in kinds
    assert any(gradient.abs().max() > 0 for gradient in trained) == has_signal


def test_the_loss_weights_scale_the_gradients(base: str) -> None:
    """The gradient is linear in the weights of the losses: that of (3, 7) is 3 times that of text alone and 7 times that of images alone."""
    config, kinds = lmfusion_config(base), ["mixed", "mixed"]
    text, image, both = (gradients(config, kinds, 1, {"text": t, "image": i})[1] for t, i in ((1.0, 0.0), (0.0, 1.0), (3.0, 7.0)))
    trained = [name for name, gradient in both.items() if gradient is not None]
    assert any(not torch.equal(text[name], image[name]) for name in trained)
    for name in trained:
        torch.testing.assert_close(both[name], 3 * text[name] + 7 * image[name], atol=2e-6, rtol=1e-4)


def test_replicated_and_sharded_mesh_with_every_option(base: str) -> None:
    """4 ranks as 2 copies of 2 shards, with activation checkpointing: still the same gradients."""
    kinds = ["mixed", "text", "image", "mixed"]
    whole = gradients(lmfusion_config(base), kinds, 1)
    config = lmfusion_config(base, {"parallel.dp_replicate": 2, "parallel.activation_checkpointing": "full"})
    assert_same(shared_pool().run(gradients, 4, config, kinds, 1)[0], whole)


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(base: str) -> None:
    _, model, parameters, optimizer = build(lmfusion_config(base))
    batches = split(make_sequences(["mixed", "mixed"], lmfusion_config(base)), lmfusion_config(base), 0, 1, 1)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    accumulate_gradients(model, batches, WEIGHTS, {"text": 1, "image": 1}, 1, torch.device("cpu"))
    frozen = set(model.plan().frozen)
    assert frozen and frozen < set(parameters)
    for name, parameter in parameters.items():
        assert (parameter.grad is None) == (name in frozen), name
    optimizer.step()
    for name, parameter in parameters.items():
        assert (parameter in optimizer.state) == (name not in frozen), name
        assert torch.equal(parameter, before[name]) == (name in frozen), name


def test_two_ranks_report_the_same_numbers_and_end_with_the_weights_of_one(base: str) -> None:
    kinds = ["mixed", "text"]
    config = lmfusion_config(base)
    alone, weights = two_steps(config, kinds)
    first, second = shared_pool().run(two_steps, 2, config, kinds)
    assert repr(first[0]) == repr(second[0]), "ranks must take the same decisions from the same numbers"
    for got, wanted in zip(first[0], alone, strict=True):
        assert got.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
    assert alone[0].loss == pytest.approx(alone[0].losses["text"] + 5 * alone[0].losses["image"])
    # AdamW divides by the gradient's own size, which turns rounding of tiny gradients into up to a learning rate.
    for name, value in weights.items():
        torch.testing.assert_close(first[1][name], value, atol=2e-4, rtol=0)


def bfloat16_gradients(config: Config, kinds: list[str]) -> tuple[list[float], dict[str, torch.Tensor | None], set[str]]:
    dtypes: set[str] = set()
    original = torch.nn.functional.silu

    def spy(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        dtypes.add(str(x.dtype))
        return original(x, *args, **kwargs)

    torch.nn.functional.silu = spy
    try:
        return *gradients(config, kinds, 1), dtypes
    finally:
        torch.nn.functional.silu = original


def bfloat16_alone(config: Config, kinds: list[str]) -> tuple[list[float], dict[str, torch.Tensor | None], set[str]]:
    with process_group(read_ranks(), config.parallel):
        return bfloat16_gradients(config, kinds)


def test_bfloat16_computes_in_bfloat16_and_keeps_master_weights(base: str) -> None:
    kinds = ["mixed", "mixed"]
    exact = gradients(lmfusion_config(base), kinds, 1)
    config = lmfusion_config(base, {"parallel.precision": "bfloat16"})
    for sums, grads, dtypes in (
        shared_pool().run(bfloat16_gradients, 2, config, kinds)[0],
        shared_pool().run(bfloat16_alone, 1, config, kinds, group=False)[0],
    ):
        assert dtypes == {"torch.bfloat16"}
        assert sums == pytest.approx(exact[0], rel=0.02) and sums != exact[0]
        assert {str(gradient.dtype) for gradient in grads.values() if gradient is not None} == {"torch.float32"}
        gap = sum((grads[name] - wanted).square().sum() for name, wanted in exact[1].items() if wanted is not None)
        size = sum(wanted.square().sum() for wanted in exact[1].values() if wanted is not None)
        assert 0 < (gap / size) ** 0.5 < 0.1


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    config = tiny_config()
    ranks, model, parameters, optimizer = build(config)
    batches = split(make_sequences(["mixed"], config), config, 0, 1, 1)
    counts = global_counts(batches)
    train_step(model, optimizer, batches, counts, WEIGHTS, 1.0, 1, ranks.device)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    batches[0].payloads["image"].values[0, 0] = math.inf
    result = train_step(model, optimizer, batches, counts, WEIGHTS, 1.0, 1, ranks.device)
    assert not result.finite
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_modality_without_targets_has_no_loss_of_its_own() -> None:
    config = tiny_config()
    ranks, model, _, optimizer = build(config)
    batches = split(make_sequences(["text"], config), config, 0, 1, 1)
    result = train_step(model, optimizer, batches, global_counts(batches), WEIGHTS, 1.0, 1, ranks.device)
    assert math.isnan(result.losses["image"]) and result.loss == result.losses["text"] and result.finite


def test_counts_cover_all_ranks_and_micro_batches() -> None:
    config = tiny_config()
    counts = global_counts(split(make_sequences(["text", "mixed"], config), config, 0, 1, 2), flops=7)
    assert counts.targets["image"] >= 1 and counts.targets["text"] >= 8 and counts.flops == 7
    assert counts == global_counts(split(make_sequences(["text", "mixed"], config), config, 0, 1, 1), flops=7)
