"""The file that seals a checkpoint: it names every other file with its size and sha256, and carries a checksum of its own."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fusiontrain
from fusiontrain.train.checkpoint.durable import write_durably
from fusiontrain.utils.errors import UserError

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
FORMAT_VERSION = 2


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or is not what was written. All ranks that check together find the same."""


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises DamagedCheckpoint where it is missing or damaged, UserError where it is of a newer format."""
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        digest = manifest.pop("sha256")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{checkpoint}: no complete checkpoint there ({MANIFEST} is missing)") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: is not readable, the checkpoint is damaged: use another one") from error
    if digest != _digest(manifest):
        raise DamagedCheckpoint(f"{path}: does not match its own checksum, the checkpoint is damaged: use another one")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: has format {manifest['format_version']}, this version reads {FORMAT_VERSION}: update fusiontrain")
    return manifest


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Seal the files of `folder` with a manifest of `content`, of which `files` and `state` are parts."""
    versions = {"fusiontrain": fusiontrain.__version__, "torch": torch.__version__, "python": platform.python_version()}
    manifest = {"format_version": FORMAT_VERSION, "step": content["state"]["step"], "versions": versions, **content}
    manifest = json.loads(json.dumps(manifest))
    write_durably(folder / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
