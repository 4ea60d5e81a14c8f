"""The index files of a source's shards, each mapped when a document of its shard is first asked for."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from fusiontrain.data.array_file import ArrayFile, map_arrays
from fusiontrain.data.index_folder import index_folders
from fusiontrain.data.index_manifest import IndexRow, Measure, Stat, TokensRow, read_manifest
from fusiontrain.utils.errors import UserError

T = TypeVar("T")
R = TypeVar("R", IndexRow, TokensRow)

MOST_OPEN = 256
"""Files that a process keeps mapped, each with a descriptor: the chunks that are shuffled together come from at most 64 shards, of two files."""


@dataclass(frozen=True, eq=False)
class ShardFiles(Generic[T, R]):
    """One file for each of n shards, by the number of the shard.

    folders [n], rows [n]: where each file lies, and what the manifest says of it. parse: from the mapped file at a path to what is in it.
    Plain data, so that it can be sent to another process; the mapped files are this process's own.
    """

    folders: Sequence[Path]
    rows: Sequence[R]
    parse: Callable[[ArrayFile, Path], T]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> T:
        """Raises UserError when the file is not what the manifest says."""
        return _opened(self, number)


@functools.lru_cache(maxsize=MOST_OPEN)
def _opened(files: ShardFiles[T, R], number: int) -> T:
    path, row = files.folders[number] / files.rows[number].file, files.rows[number]
    found = map_arrays(path)
    if found is None or found.about["row"]["digest"] != row.digest:
        raise UserError(f"{path}: this part of the index is damaged or not the one that was written; delete it and run `fusiontrain data index` again")
    return files.parse(found, path)


def look_up(shards: Sequence[Path], stats: Sequence[Stat], measure: Measure[R], index_dir: Path | None) -> list[tuple[Path, R] | None]:
    """Where the measure of each shard is kept and what the manifests say of it; None for a shard that has to be measured."""
    found: list[tuple[Path, R] | None] = [None] * len(shards)
    by_folder: dict[Path, list[int]] = {}
    for number, shard in enumerate(shards):
        by_folder.setdefault(shard.parent, []).append(number)
    for parent, numbers in by_folder.items():
        for folder in index_folders(parent, index_dir):
            rows = read_manifest(folder / measure.manifest, measure)
            files = set(os.listdir(folder)) if rows else set()
            for number in numbers:
                row = rows.get(shards[number].name)
                if row is not None and row[1:3] == stats[number] and row.file in files and found[number] is None:
                    found[number] = folder, row
    return found
