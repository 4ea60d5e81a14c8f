"""Where what is known about a shard is kept."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

FOLDER = ".fusiontrain-index"


def index_folders(shard: Path) -> tuple[Path, Path]:
    """The folder beside the shard, and the one for shards whose own folder cannot be written."""
    where = hashlib.sha256(os.fsencode(shard.parent.resolve())).hexdigest()[:16]
    return shard.parent / FOLDER, Path(tempfile.gettempdir()) / f"fusiontrain-index-{os.getuid()}" / where
