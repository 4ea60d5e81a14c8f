"""The index files of a source's shards, each mapped when a document of its shard is first asked for."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from fusiontrain.data.index.array_file import ArrayFile, map_arrays
from fusiontrain.data.index.folder import index_folders
from fusiontrain.data.index.manifest import IndexRow, Measure, Table, TokensRow, read_manifest
from fusiontrain.data.storage.shard import Shard
from fusiontrain.utils.errors import UserError

T = TypeVar("T")
R = TypeVar("R", IndexRow, TokensRow)

Folders = Mapping[Path | str, tuple[Sequence[int], Sequence[str]]]
"""Numbers and names of the shards of each folder."""

MOST_OPEN = 256
"""Files that a process keeps mapped, each with a descriptor: the chunks that are shuffled together come from at most 64 shards, of two files."""


@dataclass(frozen=True, eq=False)
class ShardFiles(Generic[T, R]):
    """One file for each of n shards, by the number of the shard.

    folders [n], rows [n]: where each file lies, and what the manifest says of it. parse: from the mapped file at a path to what is in it.
    Plain data, so that it can be sent to another process; the mapped files are this process's own.
    """

    folders: Sequence[Path]
    rows: Table[R]
    parse: Callable[[ArrayFile, Path], T]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> T:
        """Raises UserError when the file is not what the manifest says."""
        return _opened(self, number)


@functools.lru_cache(maxsize=MOST_OPEN)
def _opened(files: ShardFiles[T, R], number: int) -> T:
    row = files.rows[number]
    path = files.folders[number] / row.file
    found = map_arrays(path)
    if found is None or found.about["row"] != row._asdict():
        raise UserError(f"{path}: this part of the index is damaged or not the one that was written; delete it and run `fusiontrain data index` again")
    return files.parse(found, path)


@dataclass(frozen=True)
class Known(Generic[R]):
    """What the manifests know of n shards: the folder of each one's file and its row. A folder of None: the shard has to be measured."""

    folders: list[Path | None]
    rows: Table[R]

    @property
    def is_empty(self) -> bool:
        return not any(self.folders)

    def put(self, number: int, folder: Path, row: R) -> None:
        self.folders[number] = folder
        for field, value in row._asdict().items():
            self.rows.columns[field][number] = value


def look_up(folders: Folders, stats: Sequence[list], measures: Sequence[Measure], index_dir: Path | None) -> list[Known]:
    """What is known for each measure. stats: sizes [n] and times [n] of the shards as they are now."""
    n = len(stats[0])
    columns = ({field: [None] * n for field in measure.row._fields} for measure in measures)
    found = [Known([None] * n, Table(measure.row, empty)) for measure, empty in zip(measures, columns, strict=True)]
    for parent, (numbers, names) in folders.items():
        for folder in index_folders(parent, index_dir):
            files = set(os.listdir(folder)) if folder.is_dir() else set()
            for known, measure in zip(found, measures, strict=True):
                if measure.manifest in files:
                    _take(known, folder, read_manifest(folder / measure.manifest, measure).columns, files, numbers, names, stats)
    return found


def _take(
    known: Known, folder: Path, columns: dict[str, list], files: set[str], numbers: Sequence[int], names: Sequence[str], stats: Sequence[list]
) -> None:
    """Put in what a folder's manifest says of those shards that are as it says, and whose files are there."""
    (sizes, times), (then, at), there = stats, (columns["size"], columns["changed"]), columns["file"]
    if sizes == then and times == at and list(names) == columns["name"] and files.issuperset(there) and known.is_empty:
        # The rule: all shards lie in one folder and are as they were.
        known.folders[:] = [folder] * len(then)
        known.rows.columns.update(columns)
        return
    places = {name: place for place, name in enumerate(columns["name"])}
    for number, name in zip(numbers, names, strict=True):
        place = places.get(name)
        if place is not None and sizes[number] == then[place] and times[number] == at[place] and there[place] in files and known.folders[number] is None:
            known.folders[number] = folder
            for field, column in known.rows.columns.items():
                column[number] = columns[field][place]


def by_folder(shards: Sequence[Shard]) -> Folders:
    """Numbers and names of the shards of each folder. Of local files by strings: the hash of a Path costs more than all the rest."""
    folders: dict[str, tuple[list[int], list[str]]] = {}
    for number, shard in enumerate(shards):
        folder, name = os.fspath(shard).rpartition("/")[::2] if isinstance(shard, Path) else (str(shard.parent), shard.name)
        numbers, names = folders.setdefault(folder, ([], []))
        numbers.append(number)
        names.append(name)
    return {shards[numbers[0]].parent: (numbers, names) for numbers, names in folders.values()}
