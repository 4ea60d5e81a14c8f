"""What is done to the model from outside: the mesh, freezing, precision, recomputation, and when gradients travel."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import torch.distributed as dist

from fusiontrain.config.schema import Config, ParallelConfig
from fusiontrain.models.build import build_model
from fusiontrain.parallel.activation import clean_name
from fusiontrain.parallel.apply import freeze, parallelize
from fusiontrain.parallel.fsdp import free_gathered
from fusiontrain.parallel.mesh import build_mesh, mesh_shape, process_group, read_ranks, set_threads
from fusiontrain.parallel.reduce import gather_floats, gather_objects, on_main, sum_integers
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.ranks import RankFailure, shared_pool
from fusiontrain.testing.training import make_sequences, split
from fusiontrain.utils.errors import UserError


def spread(config: Config):
    ranks = read_ranks()
    model = build_model(config)
    plan = model.plan()
    parameters = parallelize(model, plan, config.parallel, build_mesh(config.parallel, ranks), ranks.device)
    return ranks, model, parameters


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "shape"),
    [(1, -1, 8, (1, 8)), (2, -1, 8, (2, 4)), (2, 4, 8, (2, 4)), (-1, 1, 8, (8, 1)), (-1, 4, 8, (2, 4)), (1, 1, 1, (1, 1))],
)
def test_mesh_shape(replicate: int, shard: int, world_size: int, shape: tuple[int, int]) -> None:
    assert mesh_shape(ParallelConfig(dp_replicate=replicate, dp_shard=shard), world_size) == shape


@pytest.mark.parametrize(("replicate", "shard", "world_size"), [(3, -1, 8), (1, 3, 8), (2, 2, 8), (1, 0, 1), (1, 2, 1), (-1, 3, 8), (-1, -1, 8), (-2, 1, 8)])
def test_mesh_that_does_not_fit_is_a_sentence(replicate: int, shard: int, world_size: int) -> None:
    with pytest.raises(UserError, match=r"parallel\.dp_"):
        mesh_shape(ParallelConfig(dp_replicate=replicate, dp_shard=shard), world_size)


@pytest.mark.parametrize(("near", "fits"), [(2, True), (4, True), (3, False), (8, False), (1, False)])
def test_weights_stay_sharded_over_a_part_of_the_ranks(near: int, fits: bool) -> None:
    parallel = ParallelConfig(reshard_after_forward=near)
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match=r"reshard_after_forward=.*the 8 ranks"):
        mesh_shape(parallel, 8)


def test_ranks_from_the_environment() -> None:
    assert read_ranks({}).world_size == 1
    ranks = read_ranks({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"})
    assert (ranks.rank, ranks.world_size, ranks.local_world_size, ranks.is_main) == (3, 4, 2, False)
    for broken in ({"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(UserError, match="torchrun"):
            read_ranks(broken)


def test_threads_are_shared_by_the_processes_of_a_machine() -> None:
    before = torch.get_num_threads()
    try:
        assert set_threads(3, read_ranks({})) == 3 == torch.get_num_threads()
        many = read_ranks({"RANK": "0", "WORLD_SIZE": "999", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "999"})
        assert set_threads(None, many) == 1
    finally:
        torch.set_num_threads(before)


def test_one_rank_in_float32_needs_no_group_and_no_wrapping() -> None:
    config = tiny_config()
    with process_group(read_ranks({}), config.parallel):
        assert not dist.is_initialized()
        _, model, parameters = spread(config)
    assert type(model).__name__ == "FusionModel" and all(type(p) is torch.nn.Parameter for p in parameters.values())


def test_what_the_plan_names_is_frozen_and_nothing_else() -> None:
    config = tiny_config()
    model = build_model(config)
    frozen = ("text.embedding.weight", "blocks.0.attention.q.shared.weight")
    plan = dataclasses.replace(model.plan(), frozen=frozen)
    parameters = parallelize(model, plan, config.parallel, None, torch.device("cpu"))
    assert tuple(name for name, parameter in parameters.items() if not parameter.requires_grad) == frozen


def test_freezing_an_unknown_name_fails() -> None:
    with pytest.raises(KeyError):
        freeze(build_model(tiny_config()), ("no.such.weight",), in_bfloat16=False)


def reductions() -> tuple:
    rank = dist.get_rank()
    return sum_integers([rank, 2**60]), gather_floats([rank + 0.5]), gather_objects({"rank": rank}), on_main(lambda: f"from {rank}")


def fail_on_main() -> None:
    on_main(refuse)


def refuse() -> None:
    raise UserError("nothing there")


def test_reductions_over_two_ranks() -> None:
    for answer in shared_pool().run(reductions, 2):
        assert answer == ([1, 2**61], [[0.5], [1.5]], [{"rank": 0}, {"rank": 1}], "from 0")
    with pytest.raises(RankFailure, match="nothing there"):
        shared_pool().run(fail_on_main, 2)


def forward_facts(config: Config) -> dict:
    """What the objectives are handed, and which traffic a step of two micro-batches causes."""
    ranks, model, parameters = spread(config)
    facts: dict = {"sharded": all(hasattr(p, "full_tensor") for p in parameters.values()), "names": sorted(parameters)}
    model.text_objective.register_forward_pre_hook(
        lambda _, args: facts.update(hidden=str(args[0].dtype), weights=str(args[3].dtype), kept=bool((args[3] == 1.00390625).all()))
    )
    batches = split(make_sequences(["mixed"] * 4, config), config, ranks.rank, ranks.world_size, 2)
    scatters = []
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    original = getattr(dist, name)
    setattr(dist, name, lambda *args, **kwargs: scatters.append(1) or original(*args, **kwargs))
    try:
        from fusiontrain.train.step import accumulate_gradients

        for batch in batches:
            batch.loss_weights.fill_(1.00390625)  # 1 + 2**-8, which bfloat16 rounds to 1
        accumulate_gradients(model, batches, {"text": 1, "image": 1}, {"text": 1, "image": 1}, 2, ranks.device)
    finally:
        setattr(dist, name, original)
    facts["scatters"] = len(scatters)
    with torch.no_grad():
        model(batches[0])
    gathered = not all(hasattr(p, "full_tensor") for p in model.parameters())
    free_gathered(model)
    facts["freed"] = gathered and all(hasattr(p, "full_tensor") for p in model.parameters())
    return facts


def test_bfloat16_does_not_round_the_batch_and_gradients_travel_once() -> None:
    config = tiny_config({"parallel.precision": "bfloat16", "parallel.activation_checkpointing": "full"})
    facts = shared_pool().run(forward_facts, 2, config)[0]
    assert facts["hidden"] == "torch.bfloat16"
    assert facts["weights"] == "torch.float32" and facts["kept"]
    assert facts["sharded"] and facts["freed"]
    assert facts["names"] == sorted(name for name, _ in build_model(config).named_parameters())
    assert facts["scatters"] == 3, "one per shard unit (two blocks and the root), with the last micro-batch only"


def recompute_calls(mode: str) -> tuple[int, list[str]]:
    config = tiny_config({"parallel.activation_checkpointing": mode})
    model = build_model(config)
    calls = []
    model.blocks[0].attention.register_forward_hook(lambda *_: calls.append(1))
    parameters = parallelize(model, model.plan(), config.parallel, None, torch.device("cpu"))
    batch = split(make_sequences(["mixed"], config), config, 0, 1, 1)[0]
    sum(term.sum for term in model(batch).values()).backward()
    return len(calls), sorted(parameters)


def test_activation_checkpointing_computes_twice_and_keeps_names() -> None:
    plain, recomputed = recompute_calls("none"), recompute_calls("full")
    assert (plain[0], recomputed[0]) == (1, 2)
    assert plain[1] == recomputed[1]
    assert clean_name("blocks.0._checkpoint_wrapped_module._orig_mod.norm.weight") == "blocks.0.norm.weight"
