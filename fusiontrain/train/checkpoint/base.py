"""`checkpoint.frozen: copy`: the folder of the base model, whole, inside every checkpoint, so that nothing needs the original any more.

The first checkpoint of a run copies it; those after it link to the files of the one before, which takes neither time nor room.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from fusiontrain.config.schema import Config
from fusiontrain.train.checkpoint.durable import seal, sync
from fusiontrain.train.checkpoint.folders import list_checkpoints, resume_candidates
from fusiontrain.train.checkpoint.manifest import DamagedCheckpoint, read_manifest
from fusiontrain.train.checkpoint.verify import changed, missing_or_short
from fusiontrain.utils.errors import UserError

BASE = "base"
"""Name of the folder in a checkpoint."""

PATTERNS = ("*.json", "*.safetensors")
"""Shape, tokenizer and weights of a Hugging Face folder."""


def copy_base(base: Path, checkpoint: Path) -> dict[str, Any]:
    """Put the folder `base` into a checkpoint that is being written; returns what its manifest says of the files. Raises OSError."""
    target = checkpoint / BASE
    target.mkdir()
    entries = _link_earlier(checkpoint)
    if not entries:
        files = [path for pattern in PATTERNS for path in sorted(base.glob(pattern))]
        copies = [Path(shutil.copyfile(path, target / path.name)) for path in files]
        entries = {f"{BASE}/{name}": entry for name, entry in seal(copies).items()}
    sync(target)
    return entries


def find_copy(checkpoint: Path) -> Path | None:
    """The base's folder in a complete checkpoint, if it holds one."""
    folder = checkpoint / BASE
    return folder if folder.is_dir() else None


def with_base(config: Config) -> Config:
    """`config`, its base taken from the newest checkpoint with a sound copy where the original folder is gone; as it is where there is no copy.

    Raises DamagedCheckpoint where no copy is sound: later checkpoints link to the files of earlier ones, so what harms one harms all.
    """
    if config.model.base is None or Path(config.model.base).is_dir():
        return config
    damaged: list[str] = []
    for checkpoint in resume_candidates(config.checkpoint.resume, Path(config.run.dir) / "checkpoints"):
        copy = find_copy(checkpoint)
        problems = [] if copy is None else _damage(checkpoint)
        if copy is not None and not problems:
            return replace_base(config, copy)
        damaged += problems
    if damaged:
        fact = f"{damaged[0]}, and model.base={config.model.base} is not there"
        raise DamagedCheckpoint(fact, "put the base back, the checkpoints themselves may be whole")
    return config


def replace_base(config: Config, folder: Path) -> Config:
    """`config` with its base in another folder."""
    return config.model_copy(update={"model": config.model.model_copy(update={"base": str(folder)})})


def _damage(checkpoint: Path) -> list[str]:
    """What is wrong with the copy of the base in a checkpoint."""
    try:
        entries = {name: entry for name, entry in read_manifest(checkpoint)["files"].items() if name.startswith(f"{BASE}/")}
    except DamagedCheckpoint as error:
        return [error.fact]
    found = [problem for name, entry in entries.items() if (problem := missing_or_short(checkpoint, name, entry)) is not None]
    return found or changed(checkpoint, entries.items())


def _link_earlier(checkpoint: Path) -> dict[str, Any]:
    """Link the copy of the newest complete checkpoint, and return its entries; empty where there is none or links are not possible."""
    for earlier in list_checkpoints(checkpoint.parent)[::-1][:1]:
        try:
            entries = {name: entry for name, entry in read_manifest(earlier)["files"].items() if name.startswith(f"{BASE}/")}
            for name in entries:
                os.link(earlier / name, checkpoint / name)
        except (OSError, UserError):  # no links on this disk, or a damaged checkpoint: copy anew
            for path in (checkpoint / BASE).iterdir():
                path.unlink()
            return {}
        return entries
    return {}
