"""Initial values: each parameter's spread is that of the table in models/init.py, and depends on nothing but seed and name."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontrain.models.build import build_model
from fusiontrain.testing.configs import tiny_config

SHAPE = {"model.dim": 64, "model.ffn_dim": 192, "model.num_heads": 4, "model.num_kv_heads": 2, "model.num_layers": 3, "model.vocab_size": 300}


@pytest.mark.parametrize(
    ("name", "fan_in", "shrink"),
    [
        ("text.embedding.weight", 64, 1.0),
        ("blocks.0.attention.q.shared.weight", 64, 1.0),
        ("blocks.1.attention.o.shared.weight", 64, math.sqrt(2 * 3)),
        ("blocks.2.feed_forward.up.shared.weight", 64, 1.0),
        ("blocks.2.feed_forward.down.shared.weight", 192, math.sqrt(2 * 3)),
    ],
)
def test_spread_follows_the_table(name: str, fan_in: int, shrink: float) -> None:
    weight = build_model(tiny_config(SHAPE)).get_parameter(name)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(fan_in) / shrink, rel=0.05)
    assert abs(weight.mean().item()) < 0.1 * weight.std().item()


def test_norms_are_one_biases_and_the_image_output_are_zero() -> None:
    model = build_model(tiny_config(SHAPE))
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert parameter.eq(1).all(), name
        elif name.endswith("bias") or name.startswith("image.output."):
            assert parameter.eq(0).all(), name


def test_a_parameter_depends_on_seed_and_name_alone() -> None:
    """Two layers more, and the layers that both have are the same up to the factor of the depth; another seed changes them."""
    three, five, other = (
        dict(build_model(tiny_config({**SHAPE, **change})).named_parameters()) for change in ({}, {"model.num_layers": 5}, {"seed": 9})
    )
    same = [name for name in three if "blocks.0.attention.q" in name or name.startswith("text.")]
    assert same
    for name in same:
        assert torch.equal(three[name], five[name]) and not torch.equal(three[name], other[name]), name
