"""A checkpoint that one layout of ranks saved is loaded on every other: the same weights, the same optimizer, the same next step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.models.build import declare_model, first_weights
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.mesh import build_mesh, process_group, read_ranks
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.training import full_tensors, lmfusion_config, make_sequences, split, write_base
from fusiontrain.train.checkpoint import load_checkpoint
from fusiontrain.train.ema import average_weights
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.saving import Saver
from fusiontrain.train.state import TrainState, model_tensors, optimizer_tensors
from fusiontrain.train.step import global_counts, train_step

KINDS = ("mixed", "text") * 6
WEIGHTS = {"text": 1.0, "image": 5.0}
LAYOUTS = {
    "one rank": (1, {}),
    "FSDP x2": (2, {}),
    "FSDP x3": (3, {}),
    "DDP x2": (2, {"parallel.dp_replicate": -1, "parallel.dp_shard": 1}),
    "HSDP 2x2, frozen replicated, offloaded": (4, {"parallel.dp_replicate": 2, "parallel.frozen": "replicate", "parallel.cpu_offload": True}),
}
Answer = tuple[dict[str, torch.Tensor | None], tuple[float, float]]


def go_on(config: Config, folder: str, resume: bool) -> Answer:
    """Load the checkpoint of step 2, or train two steps and save it; what is then held, and the (loss, gradient norm) of step 3."""
    ranks = read_ranks()
    with process_group(ranks, config.parallel):
        model = declare_model(config)
        embeddings, mesh = embedding_names(model), build_mesh(config.parallel, ranks)
        parameters = parallelize(model, model.plan(), config.parallel, mesh, ranks.device, first_weights(config, model))
        optimizer = build_optimizer(parameters, embeddings, config.optimizer)
        tensors = {
            "model": model_tensors(model, parameters, include_frozen=False),
            "ema": average_weights(optimizer, parameters, 0.5),
            "optimizer": optimizer_tensors(optimizer, parameters),
        }

        def step(number: int) -> tuple[float, float]:
            batches = split(make_sequences(KINDS, config, number), config, ranks.rank, ranks.world_size, 1)
            result = train_step(model, optimizer, batches, global_counts(batches), WEIGHTS, 1.0, ranks.world_size, ranks.device)
            return result.loss, result.grad_norm

        if resume:
            load_checkpoint(Path(folder) / "checkpoints" / "step-00000002", tensors, ranks)
        else:
            step(1), step(2)
        held = full_tensors({f"{group}/{name}": tensor for group, part in tensors.items() for name, tensor in part.items()})
        saver = Saver(config, ranks, tensors, {}, optimizer, lambda text: None)
        if not resume:
            saver.save(TrainState(step=2), {})  # in the background, while the next step is on its way
        following = step(3)
        saver.wait()
        saver.close()
        return held, following


def run(layout: str, base: str, folder: Path, resume: bool) -> Answer:
    world_size, overrides = LAYOUTS[layout]
    return shared_pool().run(go_on, world_size, lmfusion_config(base, {"run.dir": str(folder), **overrides}), str(folder), resume, group=world_size > 1)[0]


@pytest.mark.parametrize("saved_on", ["one rank", "FSDP x3", "HSDP 2x2, frozen replicated, offloaded"])
def test_every_layout_loads_what_another_saved(saved_on: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    wanted, (loss, norm) = run(saved_on, base, tmp_path / "run", resume=False)
    for layout in LAYOUTS:
        held, following = run(layout, base, tmp_path / "run", resume=True)
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[name], wanted[name]) for name in wanted), layout
        assert following == pytest.approx((loss, norm), rel=1e-5), layout
