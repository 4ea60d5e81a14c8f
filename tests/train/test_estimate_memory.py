"""The estimated peak of memory against what PyTorch's CPU allocator reports of a real training of the same config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.mesh import Ranks, build_mesh
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.train.estimate.simulate import simulate
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import accumulate_gradients
from fusiontrain.types import Batch

WEIGHTS = {"text": 1.0, "image": 5.0}


def small_config(recipe: str, **overrides: Any) -> Config:
    """Eight million parameters and upwards: large enough that what no tensor holds is far below a tenth."""
    shape = {"vocab_size": 2048, "dim": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 704}
    modalities = ["text"] if recipe == "dense" else ["text", "image"]
    settings = {"model": {"recipe": recipe, **shape, "image": {"patcher": "linear"}}, "data.modalities": modalities, "data.sequence_length": 512}
    return tiny_config({**settings, **{key.replace("__", "."): value for key, value in overrides.items()}})


def packed_batch(config: Config) -> Batch:
    """Two full sequences."""
    length = config.data.sequence_length
    if "image" not in config.data.modalities:
        return batch_of([document([5] * length, seed=n) for n in range(2)], config)
    image = ("image", 8, 16)
    return batch_of([document([7] * 60, image, [9] * 20, image, [4] * (length - 80 - 256), seed=n) for n in range(2)], config)


def peak_of_training(config: Config, rank: int, world_size: int, micro_batches: int) -> int:
    """Bytes that the CPU allocator has handed out at most, in the second of two steps, on this rank: everything from the model's weights on."""
    torch.set_num_threads(1)
    batch, ranks = packed_batch(config), Ranks(rank, world_size)
    mesh = build_mesh(config.parallel, ranks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = build_model(config)
        embeddings = embedding_names(model)
        parameters = parallelize(model, model.plan(), config.parallel, mesh, ranks.device)
        optimizer = build_optimizer(parameters, embeddings, config.optimizer)
        trainable = [parameter for parameter in parameters.values() if parameter.requires_grad]
        for _ in range(2):
            with torch.profiler.record_function("a step"):
                accumulate_gradients(model, [batch] * micro_batches, WEIGHTS, batch.target_counts, world_size, ranks.device)
                torch.nn.utils.clip_grad_norm_(trainable, config.optimizer.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    results = profile.profiler.kineto_results
    start = [event.start_ns() for event in results.events() if event.name() == "a step"][1]
    held: dict[int, int] = {}  # address -> bytes, of what was handed out since the beginning: earlier tests leave things behind
    total = peak = 0
    for at, address, size in sorted(allocations(results.experimental_event_tree())):
        total += size if size > 0 else -held.pop(address, 0)
        if size > 0:
            held[address] = size
        peak = max(peak, total if at >= start else 0)
    return peak


def allocations(nodes: Any) -> Iterator[tuple[int, int, int]]:
    """(time in ns, address, bytes, or fewer than none where they are given back) of everything that the allocator did below these nodes.

    But for what gloo hands itself: it copies what it reduces, as many messages at a time as it happens to be behind.
    """
    for node in nodes:
        if node.name.startswith("c10d::"):
            continue
        if node.typed[0].name == "Allocation":
            yield node.start_time_ns, node.typed[1].ptr, node.typed[1].alloc_size
        yield from allocations(node.children)


def train_rank(config: Config, micro_batches: int) -> int:
    """On a rank of the pool."""
    import torch.distributed as dist

    return peak_of_training(config, dist.get_rank(), dist.get_world_size(), micro_batches)


def measured_peak(config: Config, world_size: int) -> int:
    """Of the rank with the most. The least of several is what the run needs: a busy machine frees a gathered block later."""
    return peak_of_training(config, 0, 1, 1) if world_size == 1 else max(shared_pool().run(train_rank, 2, config, 1))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("recipe", ["dense", "lmfusion"])
def test_peak_is_the_allocators(recipe, checkpointing, world_size):
    config = small_config(recipe, parallel__activation_checkpointing=checkpointing)
    measured = min(measured_peak(config, world_size) for _ in range(3))
    memory = simulate(config, packed_batch(config), 1, world_size).memory
    estimated = max(sum(categories.values()) for categories in memory.values())
    assert 0.95 < estimated / measured < 1.05, f"measured {measured:,} bytes, estimated {estimated:,.0f}"
