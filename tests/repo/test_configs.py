"""Every YAML in the repository loads, and says nothing that the schema does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontrain.config.load import load

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads(path):
    config = load(path)
    assert config.train.steps > 0
    assert config.data.image.size % config.data.image.patch_size == 0


def test_there_are_configs():
    assert {path.name for path in CONFIGS} >= {"quickstart.yaml", "quickstart_llama.yaml"}
