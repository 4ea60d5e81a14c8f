"""A short form of `tests/soak/flips.py`: no damage to any file of a checkpoint goes unnoticed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from fusiontrain.train.checkpoint import foreign_files, verify_checkpoint

SCRIPT = Path(__file__).parents[1] / "soak" / "flips.py"


@pytest.fixture(scope="module")
def flips() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flips", SCRIPT)
    assert spec is not None and spec.loader is not None
    flips = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flips)
    return flips


def test_flips_cuts_and_deletions_of_every_file_are_found(flips: ModuleType, tmp_path: Path) -> None:
    checkpoint = flips.write_checkpoint(tmp_path)
    missed, files = flips.unnoticed(checkpoint, 66, seed=1)
    assert missed == []
    names = {path.name for path in checkpoint.rglob("*") if path.is_file()}
    assert set(files) == names == {".metadata", "__0_0.distcp", "config.json", "config.yaml", "manifest.json", "model.safetensors"}
    assert min(files.values()) >= 11


def test_what_nobody_wrote_is_named_wherever_it_lies(flips: ModuleType, tmp_path: Path) -> None:
    checkpoint = flips.write_checkpoint(tmp_path)
    (checkpoint / "base" / "more.json").write_text("{}")
    os.symlink("/etc/hostname", checkpoint / "__9_0.distcp")
    remedy = "does not belong to the checkpoint: move it elsewhere, or delete it"
    assert foreign_files(checkpoint) == [f"{checkpoint / name}: {remedy}" for name in ("__9_0.distcp", "base/more.json")]
    assert verify_checkpoint(checkpoint) == []
