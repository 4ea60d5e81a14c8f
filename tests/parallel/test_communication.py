"""What travels between ranks in one optimizer step, against what theory says for each way to spread a model.

A message's size is what an all-gather puts together, a reduce-scatter takes apart, or an all-reduce sums.
"""

from __future__ import annotations

import math

import pytest

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model, declare_model, first_weights
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.mesh import build_mesh, read_ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.traffic import Traffic
from fusiontrain.testing.training import lmfusion_config, make_sequences, split, write_base
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import accumulate_gradients, global_counts, train_step

WEIGHTS = {"text": 1.0, "image": 5.0}
NOTHING = (0, 0)
Volume = dict[str, tuple[int, int]]
"""{collective: (calls, bytes)}"""


def measure(config: Config, micro_batches: int) -> tuple[Volume, Volume, int]:
    """Traffic of the gradients of one step, of a whole step, and bytes of the optimizer's state on this rank."""
    ranks = read_ranks()
    model = declare_model(config)
    embeddings, mesh = embedding_names(model), build_mesh(config.parallel, ranks)
    parameters = parallelize(model, model.plan(), config.parallel, mesh, ranks.device, first_weights(config, model))
    optimizer = build_optimizer(parameters, embeddings, config.optimizer)
    batches = split(make_sequences(["mixed", "text"] * 4, config), config, ranks.rank, ranks.world_size, micro_batches)
    counts = global_counts(batches)
    volumes = []
    with Traffic() as gradients:
        accumulate_gradients(model, batches, WEIGHTS, counts.targets, ranks.world_size, ranks.device)
    volumes.append({kind: (gradients.calls[kind], gradients.sizes[kind]) for kind in gradients.calls})
    optimizer.zero_grad()
    with Traffic() as step:
        train_step(model, optimizer, batches, counts, WEIGHTS, 1.0, ranks.world_size, ranks.device)
    volumes.append({kind: (step.calls[kind], step.sizes[kind]) for kind in step.calls})
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    return *volumes, sum(moment.to_local().numel() * 4 for moment in moments)


def theory(config: Config, world_size: int, micro_batches: int) -> Volume:
    """Of the gradients of one step, from nothing but the shapes of the parameters, which unit they are in, and the settings."""
    model, parallel = build_model(config), config.parallel
    units = [f"blocks.{i}." for i in range(len(model.blocks))]
    replicas = world_size if parallel.dp_shard == 1 else parallel.dp_replicate
    shards = world_size // replicas
    size = 4 if parallel.precision == "float32" else 2
    gather_calls = gather_bytes = reduce_calls = reduce_bytes = 0
    for unit in [*units, "the root"]:
        mine = [p for name, p in model.named_parameters() if (name.startswith(unit) if unit in units else not name.startswith("blocks."))]
        padded = {p: math.ceil(len(p) / shards) * shards * p[0].numel() for p in mine}
        cut = [p for p in mine if p.requires_grad or parallel.frozen == "shard"]
        stays = {"default": unit == "the root", "always": False, "never": True}[str(parallel.reshard_after_forward)]
        times = 1 if stays else 2 * micro_batches
        gather_calls += times
        gather_bytes += times * size * sum(padded[p] for p in cut)
        reduce_calls += 1
        reduce_bytes += 4 * sum(padded[p] for p in mine if p.requires_grad)  # once per step, in float32, of what trains
    volume = {"all_gather": (gather_calls, gather_bytes), "reduce_scatter": (reduce_calls, reduce_bytes), "all_reduce": (reduce_calls, reduce_bytes // shards)}
    return {kind: volume[kind] for kind, ranks in (("all_gather", shards), ("reduce_scatter", shards), ("all_reduce", replicas)) if ranks > 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


MODES = {
    "FSDP x2": (2, 1, {}),
    "FSDP x3": (3, 1, {}),
    "FSDP x2, accumulation": (2, 4, {}),
    "FSDP x2, always resharded, accumulation": (2, 2, {"parallel.reshard_after_forward": "always"}),
    "FSDP x2, never resharded, accumulation": (2, 4, {"parallel.reshard_after_forward": "never"}),
    "FSDP x2, prefetch": (2, 1, {"parallel.forward_prefetch": 2, "parallel.backward_prefetch": 2}),
    "FSDP x2, bfloat16": (2, 1, {"parallel.precision": "bfloat16"}),
    "FSDP x2, frozen replicated": (2, 2, {"parallel.frozen": "replicate"}),
    "FSDP x2, frozen replicated, bfloat16": (2, 1, {"parallel.frozen": "replicate", "parallel.precision": "bfloat16"}),
    "FSDP x2, nothing frozen": (2, 1, {"model.freeze_text": False}),
    "DDP x2, accumulation": (2, 2, {"parallel.dp_replicate": -1, "parallel.dp_shard": 1}),
    "HSDP 2x2, accumulation": (4, 2, {"parallel.dp_replicate": 2}),
    "HSDP 2x2, frozen replicated": (4, 1, {"parallel.dp_replicate": 2, "parallel.frozen": "replicate"}),
}


@pytest.mark.parametrize(("world_size", "micro_batches", "overrides"), MODES.values(), ids=MODES.keys())
def test_volume_is_that_of_the_theory(world_size: int, micro_batches: int, overrides: dict, base: str) -> None:
    config = lmfusion_config(base, overrides)
    wanted = theory(config, world_size, micro_batches)
    trained = sum(p.numel() for p in build_model(config).parameters() if p.requires_grad)
    states = 0
    for gradients, step, state_bytes in shared_pool().run(measure, world_size, config, micro_batches):
        assert gradients == wanted
        for kind, (_, size) in step.items():
            assert 0 <= size - wanted.get(kind, NOTHING)[1] < 100, "a whole step adds losses and the norm: a few numbers"
        states += state_bytes
    copies = world_size if config.parallel.dp_shard == 1 else config.parallel.dp_replicate
    assert states == copies * 2 * 4 * trained, "AdamW's moments are those of what trains, and of nothing else"


def order_of_work(config: Config) -> list[str]:
    """All-gathers and blocks of a forward and backward, in the order in which the CPU starts them."""
    ranks, model, events = read_ranks(), declare_model(config), []
    parallelize(model, model.plan(), config.parallel, build_mesh(config.parallel, ranks), ranks.device, first_weights(config, model))

    class Recorder(Traffic):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "allgather" in str(function):
                events.append("gather")
            return super().__torch_dispatch__(function, types, args, kwargs)

    for index, block in enumerate(model.blocks):
        block.attention.register_forward_pre_hook(lambda *_, index=index: events.append(f"block {index}"))
        block.attention.register_full_backward_hook(lambda *_, index=index: events.append(f"back {index}"))
    with Recorder():
        accumulate_gradients(model, split(make_sequences(["mixed"] * 2, config), config, ranks.rank, 2, 1), WEIGHTS, {"text": 1, "image": 1}, 2, ranks.device)
    return events


def test_prefetch_starts_gathering_earlier() -> None:
    four = tiny_config({"model.num_layers": 4, "model.image": {"patcher": "linear"}})
    in_turn = shared_pool().run(order_of_work, 2, four)[0]
    assert in_turn[:5] == ["gather", "gather", "block 0", "gather", "block 1"], "the root, then each block before it runs"
    ahead = four.model_copy(update={"parallel": four.parallel.model_copy(update={"forward_prefetch": 2, "backward_prefetch": 3})})
    early = shared_pool().run(order_of_work, 2, ahead)[0]
    assert early[:7] == ["gather"] * 4 + ["block 0", "gather", "block 1"], "two blocks ahead"
    assert early.index("back 3") - early.index("block 3") > in_turn.index("back 3") - in_turn.index("block 3"), "and in the backward"
    assert early.count("gather") == in_turn.count("gather")
