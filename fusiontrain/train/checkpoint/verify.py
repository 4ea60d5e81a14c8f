"""Whether the files of a checkpoint are what was written."""

from __future__ import annotations

from pathlib import Path

from fusiontrain.train.checkpoint.manifest import MANIFEST, read_manifest
from fusiontrain.train.identity import sha256_of


def verify_checkpoint(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Compare size and sha256 of the files with the manifest; one sentence per problem, an empty list where all is well.

    part, parts: check only every `parts`-th file, starting with number `part`.
    """
    problems = []
    for name, entry in list(read_manifest(checkpoint)["files"].items())[part::parts]:
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{path}: is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{path}: has {path.stat().st_size} bytes instead of {entry['size']}")
        elif sha256_of(path) != entry["sha256"]:
            problems.append(f"{path}: does not match its sha256")
    return problems


def foreign_files(checkpoint: Path) -> list[str]:
    """A sentence for every file in the folder that the manifest does not name. They do no harm to a resume, but nobody wrote them there."""
    known = {MANIFEST, *read_manifest(checkpoint)["files"]}
    return [f"{path}: does not belong to the checkpoint" for path in sorted(checkpoint.iterdir()) if path.name not in known]
