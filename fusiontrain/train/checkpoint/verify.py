"""Whether the files of a checkpoint are what was written."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusiontrain.train.checkpoint.durable import CHECKSUM, THREADS, checksum_of
from fusiontrain.train.checkpoint.manifest import MANIFEST, read_manifest

CHANGED = "does not match its checksum"


def verify_checkpoint(checkpoint: Path) -> list[str]:
    """Compare size and content of the files with the manifest; one sentence per problem, an empty list where all is well."""
    files = read_manifest(checkpoint)["files"]
    problems = [missing_or_short(checkpoint, name, entry) for name, entry in files.items()]
    whole = [(name, entry) for (name, entry), problem in zip(files.items(), problems, strict=True) if problem is None]
    return [problem for problem in problems if problem is not None] + changed(checkpoint, whole)


def missing_or_short(checkpoint: Path, name: str, entry: dict[str, Any]) -> str | None:
    """A sentence if the file is not there in its size."""
    path = checkpoint / name
    if not path.is_file():
        return f"{path}: is missing"
    size = path.stat().st_size
    return f"{path}: has {size} bytes instead of {entry['size']}" if size != entry["size"] else None


def changed(checkpoint: Path, files: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """A sentence for each of these files (name, entry of the manifest) whose content is another, several being read at a time."""

    def problem(file: tuple[str, dict[str, Any]]) -> str | None:
        path = checkpoint / file[0]
        try:
            return None if checksum_of(path) == file[1][CHECKSUM] else f"{path}: {CHANGED}"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"

    with ThreadPoolExecutor(THREADS) as pool:
        return [text for text in pool.map(problem, files) if text is not None]


def foreign_files(checkpoint: Path) -> list[str]:
    """A sentence for every file in the folder that the manifest does not name. They do no harm to a resume, but nobody wrote them there."""
    known = {MANIFEST, *read_manifest(checkpoint)["files"]}
    found = (path for path in sorted(checkpoint.rglob("*")) if not path.is_dir())
    return [f"{path}: does not belong to the checkpoint: move it elsewhere, or delete it" for path in found if str(path.relative_to(checkpoint)) not in known]
