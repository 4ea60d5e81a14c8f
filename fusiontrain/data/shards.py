"""Names of shards, in an order that does not depend on the machine, and their open files."""

from __future__ import annotations

import glob
import itertools
import os
import re
import threading
from collections import OrderedDict
from pathlib import Path

from fusiontrain.utils.errors import UserError

BRACES = re.compile(r"\{([^{}]*)\}")
SHARD_SUFFIXES = (".tar", ".jsonl")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_shards(path: str) -> list[Path]:
    """The shards that `path` means: a tar or .jsonl, a folder of them, a glob, or a brace range such as `shard-{000..015}.tar`; sorted by bytes.

    Raises UserError when there is none, or when a name of a brace range is missing.
    """
    names = _expand_braces(path)
    shards: list[Path] = []
    for name in names:
        if Path(name).is_dir():
            shards += [found for found in Path(name).iterdir() if found.name.endswith(SHARD_SUFFIXES)]
        elif Path(name).is_file():  # before the glob: a name may hold brackets of its own
            shards.append(Path(name))
        elif glob.has_magic(name):
            shards += [Path(found) for found in glob.glob(name) if Path(found).is_file()]
        else:
            raise UserError(f"{name}: no such shard or folder of shards")
    if not shards:
        raise UserError(f"{path}: no .tar file or .jsonl there")
    by_name = {os.fsencode(shard): shard for shard in shards}
    return [by_name[name] for name in sorted(by_name)]


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


class OpenShards:
    """Descriptors of shards, opened on first use. Each thread has its own and at most `limit` of them, so a source may have more shards
    than a process may have open files, and no thread closes what another one reads."""

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._open: dict[int, OrderedDict[Path, int]] = {}

    def descriptor(self, shard: Path) -> int:
        """The shard's descriptor, good until this thread asks for `limit` others. Raises UserError when it cannot be opened."""
        mine = self._open.setdefault(threading.get_ident(), OrderedDict())
        if shard not in mine:
            try:
                mine[shard] = os.open(shard, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{shard}: cannot be opened ({error.strerror}); it was there when the run began") from error
        mine.move_to_end(shard)
        if len(mine) > self.limit:
            os.close(mine.popitem(last=False)[1])
        return mine[shard]

    def close(self) -> None:
        """Close them all; no thread may be reading."""
        while self._open:
            for descriptor in self._open.popitem()[1].values():
                os.close(descriptor)
