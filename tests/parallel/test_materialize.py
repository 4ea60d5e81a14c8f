"""A declared model gets the values of a model built in one process, on any layout, and no rank ever holds the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model, declare_model, first_weights
from fusiontrain.models.fusion import FusionModel
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.mesh import build_mesh, process_group, read_ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.memory import LiveBytes
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.training import full_tensors, lmfusion_config, write_base
from fusiontrain.train.checkpoint import load_checkpoint, save_checkpoint
from fusiontrain.train.retention import Retention
from fusiontrain.train.state import TrainState, model_tensors

BYTES = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


def config_of(recipe: str, base: str, overrides: dict) -> Config:
    return lmfusion_config(base, overrides) if recipe == "lmfusion" else tiny_config(overrides)


def spread(config: Config) -> tuple[FusionModel, dict[str, torch.nn.Parameter]]:
    ranks = read_ranks()
    model = declare_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model, parallelize(model, model.plan(), config.parallel, build_mesh(config.parallel, ranks), ranks.device, first_weights(config, model))


def values(config: Config) -> tuple[dict, dict]:
    """Parameters and buffers of a model that all ranks have materialized together, and which of its parameters are cut."""
    with process_group(read_ranks(), config.parallel):
        model, parameters = spread(config)
        cut = {name: parameter.to_local().numel() for name, parameter in parameters.items() if hasattr(parameter, "to_local")}
        return full_tensors({**parameters, **dict(model.named_buffers())}), cut


LAYOUTS = [
    (1, {}),
    (1, {"parallel.precision": "bfloat16"}),
    (1, {"parallel.cpu_offload": True}),
    (2, {"parallel.precision": "bfloat16"}),
    (2, {"parallel.frozen": "replicate", "parallel.precision": "bfloat16"}),
    (2, {"parallel.dp_replicate": -1, "parallel.dp_shard": 1}),
    (2, {"parallel.cpu_offload": True, "parallel.activation_checkpointing": "full"}),
    (3, {}),
    (4, {"parallel.dp_replicate": 2}),
]


@pytest.mark.parametrize(("world_size", "overrides"), LAYOUTS, ids=str)
@pytest.mark.parametrize("recipe", ["lmfusion", "transfusion"])
def test_values_are_those_of_one_process(recipe: str, world_size: int, overrides: dict, base: str) -> None:
    config = config_of(recipe, base, overrides)
    model = build_model(config)
    frozen = set(model.plan().frozen)
    for got, cut in shared_pool().run(values, world_size, config, group=world_size > 1):
        assert got.keys() == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        for name, wanted in (*model.named_parameters(), *model.named_buffers()):
            dtype = torch.bfloat16 if name in frozen and "parallel.precision" in overrides else wanted.dtype
            assert torch.equal(got[name], wanted.to(dtype)) and got[name].dtype == dtype, name
        if config.parallel.frozen == "replicate" or config.parallel.dp_shard == 1:
            assert cut and not frozen & cut.keys()


def rows_asked_for(config: Config) -> dict[str, tuple[int, int]]:
    ranks, model, asked = read_ranks(), declare_model(config), {}
    read_rows = first_weights(config, model)

    def spy(name: str, shape: torch.Size, first: int, last: int) -> torch.Tensor:
        asked[name] = (first, last)
        return read_rows(name, shape, first, last)

    parallelize(model, model.plan(), config.parallel, build_mesh(config.parallel, ranks), ranks.device, spy)
    return asked


def test_every_row_is_read_by_one_rank(base: str) -> None:
    config = lmfusion_config(base)
    asked = shared_pool().run(rows_asked_for, 3, config)
    for name, parameter in build_model(config).named_parameters():
        rows = [row for ranges in asked for row in range(*ranges[name])]
        assert rows == list(range(len(parameter))), name


MANY_LAYERS = {"model.num_layers": 16, "model.vocab_size": 300, "model.image": {"patcher": "linear"}}


def memory(config: Config, folder: str) -> tuple[int, int, int]:
    """Most bytes that tensors of this rank took while the model was made, saved, and loaded again."""
    ranks = read_ranks()
    with LiveBytes() as made:
        model, parameters = spread(config)
    tensors = {"model": model_tensors(model, parameters, include_frozen=True)}
    with LiveBytes() as saved:
        path = save_checkpoint(Path(folder), TrainState(step=1), tensors, {}, "", ranks, Retention(1), {})
    with LiveBytes() as loaded:
        load_checkpoint(path, tensors, ranks)
    return made.peak, saved.peak, loaded.peak


def test_no_rank_ever_allocates_the_whole_model(tmp_path: Path) -> None:
    config = tiny_config(MANY_LAYERS)
    with LiveBytes() as plain:
        model = build_model(config)
    sizes = [parameter.numel() * BYTES for parameter in model.parameters()]
    assert plain.peak >= sum(sizes), "what a whole model takes is seen"
    share = sum(sizes) / 4
    for made, saved, loaded in shared_pool().run(memory, 4, config, str(tmp_path)):
        assert made <= 1.1 * share + 3 * max(sizes) < 0.6 * sum(sizes)
        assert made >= share, "the rank's own shards are seen"
        assert saved <= 1.1 * share + max(sizes) and loaded <= 1.1 * share + max(sizes)
