"""Where what is known about a shard is kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fusiontrain.data.storage.shard import Shard, digest, user_cache

FOLDER = ".fusiontrain-index"


def index_folders(shard: Shard) -> tuple[Path, ...]:
    """Of a local file the folder beside it, and the one for shards whose own folder cannot be written; of others one in `data.storage.index_dir`."""
    parent = shard.parent
    if not isinstance(shard, Path) and isinstance(parent, str):
        root = Path(shard.settings.index_dir) if shard.settings.index_dir else user_cache() / "index"
        return (root / digest(parent),)
    parent = Path(parent)
    where = digest(str(parent.resolve()))
    return parent / FOLDER, Path(tempfile.gettempdir()) / f"fusiontrain-index-{os.getuid()}" / where
