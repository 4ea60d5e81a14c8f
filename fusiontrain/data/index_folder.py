"""Where what is known about a shard is kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fusiontrain.data.storage.shard import GzipShard, PipeShard, RemoteShard, Shard, digest, user_cache

FOLDER = ".fusiontrain-index"


def index_folders(shard: Shard) -> tuple[Path, ...]:
    """Of a local file the folder beside it, and the one for shards whose own folder cannot be written; of others one in `data.storage.index_dir`."""
    if isinstance(shard, GzipShard):
        return index_folders(shard.origin)
    if isinstance(shard, RemoteShard | PipeShard):
        root = Path(shard.settings.index_dir) if shard.settings.index_dir else user_cache() / "index"
        return (root / digest(shard.command if isinstance(shard, PipeShard) else str(shard).rpartition("/")[0]),)
    where = digest(str(shard.parent.resolve()))
    return shard.parent / FOLDER, Path(tempfile.gettempdir()) / f"fusiontrain-index-{os.getuid()}" / where
