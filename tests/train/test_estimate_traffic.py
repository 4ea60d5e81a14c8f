"""The traffic of an estimate against what two real ranks hand to gloo, and against what FSDP must move by hand calculation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.mesh import Ranks, build_mesh
from fusiontrain.testing.batches import random_documents
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.train.estimate.layers import simulate_layers, with_shape
from fusiontrain.train.estimate.simulate import simulate
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import accumulate_gradients
from fusiontrain.types import Batch

COLLECTIVES = {"all_gather_single": "all-gather", "reduce_scatter_single": "reduce-scatter", "all_reduce": "all-reduce"}


def lmfusion(**overrides: Any) -> Config:
    return tiny_config({"model.recipe": "lmfusion", **{key.replace("__", "."): value for key, value in overrides.items()}})


def a_batch(config: Config) -> Batch:
    return batch_of([document([256, 9, 8, 258], ("image", 2, 2), [259, 33, 34, 257]), *random_documents(3, 1)], config)


def observed(config: Config, micro_batches: int) -> dict[str, int]:
    """Bytes that a training step hands to the functions of torch.distributed which FSDP calls, on a rank of the pool."""
    torch.set_num_threads(1)
    found = dict.fromkeys(COLLECTIVES.values(), 0)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    batch, model = a_batch(config), build_model(config)
    embeddings = embedding_names(model)
    parameters = parallelize(model, model.plan(), config.parallel, build_mesh(config.parallel, ranks), ranks.device)
    optimizer = build_optimizer(parameters, embeddings, config.optimizer)

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            found[COLLECTIVES[name]] += max(tensor.nbytes for tensor in tensors)
            return function(*args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    for name, function in originals.items():
        setattr(dist, name, counting(name, function))
    try:
        accumulate_gradients(model, [batch] * micro_batches, {"text": 1.0, "image": 5.0}, batch.target_counts, ranks.world_size, ranks.device)
        optimizer.step()
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    return found


def by_collective(config: Config, micro_batches: int, world_size: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for channel, size in simulate(config, a_batch(config), micro_batches, world_size).bytes.items():
        found[channel.collective] = found.get(channel.collective, 0) + size
    return found


SETTINGS: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({"parallel__precision": "bfloat16"}, 5),
    ({"parallel__activation_checkpointing": "full", "parallel__frozen": "replicate"}, 1),
    ({"parallel__dp_replicate": 2}, 2),
    ({"model__freeze_text": False, "parallel__reshard_after_forward": "never"}, 2),
]


@pytest.mark.parametrize(("overrides", "micro_batches"), SETTINGS, ids=str)
def test_traffic_is_that_of_two_ranks(overrides, micro_batches):
    config = lmfusion(**overrides)
    measured = shared_pool().run(observed, 2, config, micro_batches)[0]
    estimated = by_collective(config, micro_batches, 2)
    for collective in ("all-gather", "reduce-scatter"):
        assert estimated.get(collective, 0) == measured[collective], collective
    # The norms of the gradients, a float32 number each, are in the estimate and not in what was measured.
    assert 0 <= estimated.get("all-reduce", 0) - measured["all-reduce"] <= 4 * len(list(build_model(config).parameters()))


def test_traffic_is_what_fsdp_must_move():
    """Every unit is gathered for the forward and, but for the root, again for the backward; gradients of what trains are reduced in float32."""
    config = lmfusion()
    model = build_model(config)
    padded = {name: -(-len(p) // 4) * 4 * (p.numel() // len(p)) for name, p in model.named_parameters()}
    blocks = sum(size for name, size in padded.items() if name.startswith("blocks."))
    root = sum(size for name, size in padded.items() if not name.startswith("blocks."))
    trains = sum(padded[name] for name, p in model.named_parameters() if p.requires_grad)
    found = by_collective(config, 1, 4)
    assert found["all-gather"] == 4 * (2 * blocks + root)
    assert found["reduce-scatter"] == 4 * trains


DEEP: list[dict[str, Any]] = [
    {},
    {"parallel__activation_checkpointing": "full", "parallel__activation_checkpointing_every": 3},
    {"parallel__activation_checkpointing": "selective"},
]


@pytest.mark.parametrize("overrides", DEEP, ids=str)
def test_a_deep_model_is_told_from_shallow_ones(overrides):
    config = lmfusion(model__num_layers=9, parallel__precision="bfloat16", **overrides)
    shape, batch = build_model(config).shape, a_batch(config)
    whole, told = simulate(with_shape(config, shape, 9), batch, 3, 8), simulate_layers(config, shape, batch, 3, 8)
    assert told.bytes == whole.bytes and told.calls == whole.calls
    for phase, categories in whole.memory.items():
        assert sum(told.memory[phase].values()) == pytest.approx(sum(categories.values()), rel=0.01), phase


def test_counting_would_notice_a_model_that_changed():
    """The numbers above are not all alike."""
    assert by_collective(lmfusion(), 1, 2) != by_collective(lmfusion(model__num_layers=3), 1, 2)
    assert isinstance(build_model(lmfusion()), nn.Module)
