"""The parity matrix: one tiny LMFusion, five steps of the same global batches, however they and the weights are spread over ranks.

Among the batches are ranks without images, a step of text alone, and a rank with padding alone.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.models.build import declare_model, first_weights
from fusiontrain.models.plan import ReadRows
from fusiontrain.parallel import apply
from fusiontrain.parallel.mesh import build_mesh, process_group, read_ranks
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.training import full_tensors, lmfusion_config, make_sequences, split, write_base
from fusiontrain.train.ema import average_weights
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import global_counts, train_step

STEPS = (
    ("mixed", "text", "image", "mixed", "text", "text", "mixed", "mixed"),  # the third of four ranks has no image
    ("mixed",) * 8,
    ("text",) * 8,  # nobody has one
    ("empty", "empty", "mixed", "image", "mixed", "mixed", "image", "text"),  # the first of four has padding alone
    ("mixed", "mixed", "mixed", "mixed", "text", "text", "text", "text"),  # the second of two has no image
)
WEIGHTS = {"text": 1.0, "image": 5.0}
DECAY = 0.7


def awake(read_rows: ReadRows) -> ReadRows:
    """The image output starts at zero, which hides gradients behind it: fill it with numbers that only their place decides."""

    def read(name: str, shape: torch.Size, first: int, last: int) -> torch.Tensor:
        if not name.startswith("image.output."):
            return read_rows(name, shape, first, last)
        return torch.sin(torch.arange(shape.numel()).float()).view(shape)[first:last] * 0.3

    return read


def five_steps(config: Config, micro_batches: int = 1) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor | None]]:
    """(loss, gradient norm) of every step, and the moving averages of the weights where the config keeps them."""
    ranks = read_ranks() if torch.distributed.is_initialized() else read_ranks({})
    with process_group(ranks, config.parallel):
        model = declare_model(config)
        embeddings, mesh = embedding_names(model), build_mesh(config.parallel, ranks)
        with mock.patch.object(apply, "compile_units", partial(apply.compile_units, backend="aot_eager")):  # inductor has a test of its own, of minutes
            parameters = apply.parallelize(model, model.plan(), config.parallel, mesh, ranks.device, awake(first_weights(config, model)))
        optimizer = build_optimizer(parameters, embeddings, config.optimizer)
        averages = average_weights(optimizer, parameters, config.train.ema_decay) if config.train.ema_decay else {}
        numbers = []
        for step, kinds in enumerate(STEPS):
            batches = split(make_sequences(kinds, config, step), config, ranks.rank, ranks.world_size, micro_batches)
            result = train_step(model, optimizer, batches, global_counts(batches), WEIGHTS, 1.0, ranks.world_size, ranks.device)
            numbers.append((result.loss, result.grad_norm))
        return numbers, full_tensors(averages)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(base: str) -> tuple:
    return five_steps(lmfusion_config(base, {"train.ema_decay": DECAY}))


MATRIX = {
    "accumulation": (1, 4, {}),
    "cpu offload on one rank": (1, 1, {"parallel.cpu_offload": True}),
    "FSDP x2": (2, 1, {}),
    "FSDP x2, accumulation": (2, 2, {}),
    "FSDP x2, accumulation, never resharded": (2, 4, {"parallel.reshard_after_forward": "never"}),
    "FSDP x2, always resharded": (2, 1, {"parallel.reshard_after_forward": "always"}),
    "FSDP x2, prefetch": (2, 1, {"parallel.forward_prefetch": 2, "parallel.backward_prefetch": 2}),
    "FSDP x2, frozen replicated": (2, 2, {"parallel.frozen": "replicate"}),
    "FSDP x2, cpu offload": (2, 2, {"parallel.cpu_offload": True}),
    "FSDP x2, moving average": (2, 1, {"train.ema_decay": DECAY}),
    "FSDP x2, selective checkpointing of every second block": (
        2, 2, {"parallel.activation_checkpointing": "selective", "parallel.activation_checkpointing_every": 2}
    ),
    "FSDP x2, no frozen prefix": (2, 1, {"parallel.frozen_prefix": False}),
    "FSDP x2, compiled": (2, 2, {"parallel.compile": True}),
    "FSDP x2, compiled, selective checkpointing": (2, 1, {"parallel.compile": True, "parallel.activation_checkpointing": "selective"}),
    "DDP x2": (2, 1, {"parallel.dp_replicate": -1, "parallel.dp_shard": 1}),
    "DDP x2, accumulation, checkpointing": (2, 2, {"parallel.dp_replicate": 2, "parallel.activation_checkpointing": "full"}),
    "FSDP x4": (4, 1, {}),
    "FSDP x4, resharded over 2": (4, 1, {"parallel.reshard_after_forward": 2}),
    "HSDP 2x2": (4, 2, {"parallel.dp_replicate": 2}),
    "HSDP 2x2, everything": (
        4,
        1,
        {"parallel.dp_replicate": 2, "parallel.frozen": "replicate", "parallel.cpu_offload": True, "parallel.activation_checkpointing": "full",
         "train.ema_decay": DECAY, "parallel.forward_prefetch": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("world_size", "micro_batches", "overrides"), MATRIX.values(), ids=MATRIX.keys())
def test_losses_and_gradient_norms_are_those_of_one_rank(world_size: int, micro_batches: int, overrides: dict, alone: tuple, base: str) -> None:
    config = lmfusion_config(base, overrides)
    answers = [five_steps(config, micro_batches)] if world_size == 1 else shared_pool().run(five_steps, world_size, config, micro_batches)
    assert all(numbers == answers[0][0] for numbers, _ in answers), "all ranks tell the same"
    for step, (got, wanted) in enumerate(zip(answers[0][0], alone[0], strict=True)):
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7), f"step {step + 1}"
    for name, average in answers[0][1].items():
        torch.testing.assert_close(average, alone[1][name], atol=1e-4, rtol=0)


def test_the_steps_are_worth_comparing(alone: tuple) -> None:
    norms = [norm for _, norm in alone[0]]
    assert norms[2] == 0 and min(norms[:2] + norms[3:]) > 1e-3, "text alone trains nothing beside a frozen text side"
    assert len({loss for loss, _ in alone[0]}) == len(STEPS) and len(alone[1]) > 10
