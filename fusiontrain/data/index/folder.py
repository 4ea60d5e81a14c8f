"""Where what is known about the shards of a folder is kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fusiontrain.data.storage.shard import digest, user_cache

FOLDER = ".fusiontrain-index"


def index_folders(shards: Path | str, index_dir: Path | None = None) -> tuple[Path, ...]:
    """Where to look, and then to write, for the shards of the folder `shards`: in `index_dir` if it is given; else beside the shards, or in the
    temporary folder where that cannot be written, and for shards that are not local files in the user's cache folder."""
    if isinstance(shards, str):
        return ((index_dir or user_cache() / "index") / digest(shards),)
    where = digest(str(shards.resolve()))
    if index_dir is not None:
        return (index_dir / f"{shards.resolve().name}-{where}",)
    return shards / FOLDER, Path(tempfile.gettempdir()) / f"fusiontrain-index-{os.getuid()}" / where
