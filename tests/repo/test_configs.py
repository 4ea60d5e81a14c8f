"""Every YAML in the repository is right, complete, and says which files it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fusiontrain.config.load import load, to_yaml
from fusiontrain.config.validate import MARKER_TOKENS, image_tokens, uses_images

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def keys_of(value: Any, prefix: str = "") -> set[str]:
    """Dotted keys of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {prefix.rstrip(".")} | {key for name, item in items for key in keys_of(item, f"{prefix}{name}.")}


def test_there_are_configs():
    assert {path.name for path in CONFIGS} >= {"quickstart.yaml", "quickstart_llama.yaml", "lmfusion.yaml", "lmfusion_8b.yaml", "transfusion_7b.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads(path):
    config = load(path)
    tokens = image_tokens(config)
    assert not uses_images(config) or tokens is None or tokens + MARKER_TOKENS <= config.data.sequence_length


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_complete(path):
    """Every key is written out, so that a later change of a default changes no published setting."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert keys_of(yaml.safe_load(to_yaml(load(path)))) - keys_of(written) == set()


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent.name != "debug"], ids=lambda path: path.name)
def test_only_debug_configs_make_their_own_data(path):
    assert load(path).demo is None
