"""Names of shards, in an order that does not depend on the machine."""

from __future__ import annotations

import glob
import itertools
import re
from pathlib import Path

from fusiontrain.utils.errors import UserError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_shards(path: str) -> list[Path]:
    """The tars that `path` means: a tar, a folder of tars, a glob, or a brace range such as `shard-{000..015}.tar`; sorted by bytes.

    Raises UserError when there is none, or when a name of a brace range is missing.
    """
    names = _expand_braces(path)
    shards: list[Path] = []
    for name in names:
        if Path(name).is_dir():
            shards += Path(name).glob("*.tar")
        elif glob.has_magic(name):
            shards += map(Path, glob.glob(name))
        elif Path(name).is_file():
            shards.append(Path(name))
        else:
            raise UserError(f"{name}: no such shard or folder of shards")
    if not shards:
        raise UserError(f"{path}: no .tar file there")
    return sorted(set(shards), key=lambda shard: str(shard).encode())


def _expand_braces(path: str) -> list[str]:
    parts = BRACES.split(path)  # outside, inside, outside, ...
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    match = RANGE.fullmatch(inside)
    if match is None:
        return inside.split(",")
    first, last = match.groups()
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
