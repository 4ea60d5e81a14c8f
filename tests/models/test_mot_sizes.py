"""Parameter counts of the configs against the papers' names: those that a token passes, as their dense counterparts have."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontrain.config.load import load
from fusiontrain.models.build import declare_model
from fusiontrain.models.fusion import FusionModel

CONFIGS = Path(__file__).parents[2] / "configs"

ACTIVE_MILLIONS = {
    "mot_chameleon_37m": 36.96,
    "mot_chameleon_94m": 94.4,
    "mot_chameleon_443m": 442.5,
    "mot_chameleon_880m": 880.8,
    "mot_chameleon_1_5b": 1501.6,
    "mot_chameleon_7b": 7012.9,
    "mot_transfusion_163m": 162.4,
    "mot_transfusion_760m": 777.8,
    "mot_transfusion_1_4b": 1364,
    "mot_transfusion_7b": 6738,
    "chameleon_7b": 7012.9,
}
"""By arithmetic from the published widths, untied embeddings of 65,536 or 32,000 tokens and SwiGLU of 8 / 3 of the width, up to whole 256."""

PUBLISHED_MILLIONS = {"37m": 37, "94m": 94, "443m": 443, "880m": 880, "1_5b": 1500, "163m": 163, "1_4b": 1400, "7b": 7000}
"""The names in numbers."""


def declared(name: str) -> FusionModel:
    return declare_model(load(CONFIGS / f"{name}.yaml"))


def count(model: FusionModel, *, without: tuple[str, ...]) -> int:
    """Parameters, but for the image patcher and those of the weight groups `without`."""
    parts = {name: name.split(".") for name, _ in model.named_parameters()}
    return sum(p.numel() for name, p in model.named_parameters() if parts[name][0] != "image" and not set(without) & set(parts[name]))


@pytest.mark.parametrize("name", ACTIVE_MILLIONS)
def test_a_token_passes_as_many_parameters_as_the_papers_names_say(name):
    active = count(declared(name), without=("image",))
    assert active / 1e6 == pytest.approx(ACTIVE_MILLIONS[name], rel=1e-3)
    published = next((number for size, number in PUBLISHED_MILLIONS.items() if name.endswith(f"_{size}")), None)
    assert published is None or active / 1e6 == pytest.approx(published, rel=0.04)


@pytest.mark.parametrize("name", ["mot_chameleon_443m", "mot_transfusion_163m"])
def test_mot_has_every_weight_of_the_body_once_per_modality(name):
    model = declared(name)
    tables = sum(parameter.numel() for parameter in model.text.parameters())
    body = count(model, without=("image",)) - tables
    assert count(model, without=()) == tables + 2 * body
    assert not any("shared" in name for name, _ in model.named_parameters())


def test_the_larger_chameleon_is_one_of_34b():
    assert count(declared("chameleon_34b"), without=()) / 1e9 == pytest.approx(34, rel=0.02)
