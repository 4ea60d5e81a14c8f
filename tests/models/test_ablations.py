"""Every value of the papers' ablations trains and paints: Transfusion, Tables 5 to 8, and LMFusion, section 5.1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fusiontrain.config.schema import Config
from fusiontrain.config.validate import cross_section_problems, has_frozen_prefix
from fusiontrain.data.collate import collate
from fusiontrain.generate.paint import paint
from fusiontrain.models.build import build_model
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import document
from fusiontrain.testing.generation import BOI, EOI, TOKENIZER
from fusiontrain.testing.training import lmfusion_config, write_base
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import global_counts, train_step
from fusiontrain.types import Document, PackedSequence

SMALL = {"model.image": {"unet_channels": 8}, "objective.num_timesteps": 20}
TRANSFUSION: dict[str, dict[str, Any]] = {
    **{f"{patcher}, patch {side}": {"model.image.patcher": patcher, "data.image.patch_size": side} for patcher in ("linear", "unet") for side in (1, 2, 4, 8)},
    **{f"{patcher}, causal": {"model.image.patcher": patcher, "data.image.attention": "causal"} for patcher in ("linear", "unet")},
    "no document mask": {"data.document_mask": False},
    "image first and capped": {"data.image.image_first_noise_cap": 0.5},
    "image first and clean": {"data.image.image_first_noise_cap": 0.0},
    "z-loss": {"objective.z_loss": 1e-5},
    **{f"predicts {name}": {"objective.prediction": name} for name in ("v", "x0")},
    "rectified flow": {"objective.image": "flow_matching", "objective.time_shift": 3.0},
}


def documents(config: Config) -> list[Document]:
    """A caption and its picture, and a picture whose text comes after it."""
    image = config.data.image
    side, causal = image.size // image.patch_size, image.attention == "causal"
    patches, numbers, cap = ("image", side, side), image.channels * image.patch_size**2, image.image_first_noise_cap
    made = [
        document([256, 65, 66, BOI], patches, [EOI, 257], patch_dim=numbers, seed=1),
        document([256, BOI], patches, [EOI, 67, 68, 257], patch_dim=numbers, seed=2, max_timestep=cap),
    ]
    return [as_read(one, causal) for one in made]


def as_read(one: Document, causal: bool) -> Document:
    """The document with its pictures' patches in order, if `causal`."""
    return replace(one, segments=tuple(replace(segment, bidirectional=segment.bidirectional and not causal) for segment in one.segments))


def losses_and_picture(config: Config) -> tuple[list[float], np.ndarray]:
    """Losses of three steps on one batch, and then a picture."""
    assert not cross_section_problems(config)
    model = build_model(config)
    optimizer = build_optimizer(dict(model.named_parameters()), embedding_names(model), config.optimizer)
    sequences = [PackedSequence(tuple(documents(config)), config.data.sequence_length, 7)]
    batch = collate(sequences, config.data, has_frozen_prefix(config))
    weights = {"text": config.objective.text_weight, "image": config.objective.image_weight}
    losses = [train_step(model, optimizer, [batch], global_counts([batch]), weights, 1.0, 1, torch.device("cpu")).loss for _ in range(3)]
    (picture,) = paint(model, TOKENIZER, ["AB"], image=config.data.image, steps=2, guidance=2.0, seed=0, context=config.data.sequence_length)
    return losses, picture


@pytest.mark.parametrize("settings", TRANSFUSION.values(), ids=TRANSFUSION)
def test_transfusion(settings: dict[str, Any]) -> None:
    losses, picture = losses_and_picture(tiny_config({"data.sequence_length": 160, **SMALL, **settings}))
    assert losses[2] < losses[0] and picture.shape == (8, 8, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("ratio", [0, 0.1, 1])
@pytest.mark.parametrize("separation", ["dense", "shallow", "deep"])
def test_lmfusion(base: str, separation: str, ratio: float) -> None:
    rates = {"model.freeze_text": ratio == 0, "optimizer.text_learning_rate_ratio": ratio or 1.0}
    losses, picture = losses_and_picture(lmfusion_config(base, {"model.separation": separation, **SMALL, **rates}))
    assert losses[2] < losses[0] and picture.shape == (8, 8, 3)


FEED_FORWARD = {"feed_forward_norm", "feed_forward.gate", "feed_forward.up", "feed_forward.down"}
ATTENTION = {"attention_norm", "attention.q", "attention.k", "attention.v", "attention.o"}


@pytest.mark.parametrize(("separation", "apart"), [("dense", set()), ("shallow", FEED_FORWARD), ("deep", FEED_FORWARD | ATTENTION)])
def test_what_lmfusion_separates(base: str, separation: str, apart: set[str]) -> None:
    """Section 5.1 of the paper, weight by weight: shallow is the feed-forward with its norm, deep attention too."""
    names = build_model(lmfusion_config(base, {"model.separation": separation, **SMALL})).state_dict()
    assert {name.removeprefix("blocks.0.").removesuffix(".image.weight") for name in names if name.startswith("blocks.0.") and ".image." in name} == apart
