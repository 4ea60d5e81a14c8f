"""Where what is known about the shards of a folder is kept."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

FOLDER = ".fusiontrain-index"


def index_folders(shards: Path, index_dir: Path | None = None) -> tuple[Path, ...]:
    """Where to look, and then to write, for the shards of the folder `shards`: `index_dir` if it is given; else beside the shards, or in the
    temporary folder where that cannot be written."""
    where = hashlib.sha256(os.fsencode(shards.resolve())).hexdigest()[:16]
    if index_dir is not None:
        return (index_dir / f"{shards.resolve().name}-{where}",)
    return shards / FOLDER, Path(tempfile.gettempdir()) / f"fusiontrain-index-{os.getuid()}" / where
