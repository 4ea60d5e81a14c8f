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
FORMAT_VERSION = 5


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or is not what was written: `fact`, and what to do. All ranks that check together find the same."""

    def __init__(self, fact: str, remedy: str = "the checkpoint is damaged, use another one") -> None:
        super().__init__(fact, remedy)
        self.fact, self.remedy = fact, remedy

    def __str__(self) -> str:
        return f"{self.fact}: {self.remedy}"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises DamagedCheckpoint where it is missing or one byte of it is another, UserError for another format."""
    path = checkpoint / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        sealed = _sealed({key: value for key, value in manifest.items() if key != "sha256"})
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{checkpoint}: no complete checkpoint there ({MANIFEST} is missing)", "give another folder") from error
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: is not readable") from error
    if content != sealed.encode():
        raise DamagedCheckpoint(f"{path}: does not match its own checksum")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: has format {manifest['format_version']}, this version reads {FORMAT_VERSION}: use fusiontrain {manifest['versions']['fusiontrain']}, "
            "which wrote it"
        )
    return manifest


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Seal the files of `folder` with a manifest of `content`, of which `files` and `state` are parts."""
    versions = {"fusiontrain": fusiontrain.__version__, "torch": torch.__version__, "python": platform.python_version()}
    manifest = {"format_version": FORMAT_VERSION, "step": content["state"]["step"], "versions": versions, **content}
    write_durably(folder / MANIFEST, _sealed(json.loads(json.dumps(manifest))))


def _sealed(manifest: Mapping[str, Any]) -> str:
    """The text of the file: there is one for every content, so whatever differs from it was not written here."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)
