"""What a start must know of every shard of a folder, in one file, so that it opens that and none of the others.

A manifest is written for each thing that is measured: the index of the shards, and their token ids for each tokenizer. It says of which shard
(size and time) and with what result; whether the shards are still those is seen by looking at their size and time, without opening them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from fusiontrain.data.index.array_file import write_whole
from fusiontrain.data.storage.shard import Shard

VERSION = 9


class Stat(NamedTuple):
    """By what a shard that was changed is told from the one that was measured: its size in bytes, and the time of its
    change in nanoseconds or the tag that its store gives it."""

    size: int
    changed: int | str


class IndexRow(NamedTuple):
    """The index of a shard: the shard's name and state, the name of the file, a hash of what the plan depends on, and what is in it."""

    name: str
    size: int
    changed: int | str
    file: str
    digest: str
    documents: int
    unusable: int
    images: int
    text_bytes: int


class TokensRow(NamedTuple):
    """The token ids of a shard, likewise."""

    name: str
    size: int
    changed: int | str
    file: str
    digest: str
    tokens: int


R = TypeVar("R", IndexRow, TokensRow)


@dataclass(frozen=True)
class Measure(Generic[R]):
    """A thing that is measured of shards and kept in a file for each. depends_on: all that the result depends on, but for the shard."""

    what: str
    row: type[R]
    depends_on: tuple[object, ...]

    @property
    def manifest(self) -> str:
        """The name of the manifest's file."""
        return f"manifest.{_hash(*self.depends_on)}.{self.what}.json"

    def file(self, shard: Shard, stat: Stat) -> str:
        """The name of the file for a shard. It holds a hash of what the content depends on, so a file that is there is right."""
        return f"{shard.stem}.{_hash(shard.name, *stat, *self.depends_on)}.{self.what}"


class Table(Sequence[R]):
    """Rows, kept as a list for each field: of 10,000 shards that is ten lists instead of as many objects as the garbage collector walks over."""

    def __init__(self, row: type[R], columns: Mapping[str, list[Any]]) -> None:
        self.row: Any = row
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(self.columns["name"])

    def __getitem__(self, number: Any) -> Any:
        return self.row(**{field: column[number] for field, column in self.columns.items()})

    @classmethod
    def of(cls, row: type[R], rows: Sequence[R]) -> Table[R]:
        return cls(row, {field: [getattr(values, field) for values in rows] for field in row._fields})


def read_manifest(path: Path, measure: Measure[R]) -> Table[R]:
    """The manifest's rows; none where there is no such file, or it is damaged or of another version."""
    try:
        content = json.loads(path.read_bytes())
        columns = {field: content["columns"][field] for field in measure.row._fields}
        if content["version"] == VERSION and len(set(map(len, columns.values()))) == 1:
            return Table(measure.row, columns)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Table.of(measure.row, [])


def add_to_manifest(path: Path, measure: Measure[R], rows: Iterable[R]) -> None:
    """Put rows in the place of older ones of the same shards. Raises OSError.

    Of two processes that add at once, the rows of one may be missing afterwards: then their files are found by name.
    """
    by_name: dict[str, Any] = {row.name: row for row in (*read_manifest(path, measure), *rows)}
    columns = Table.of(measure.row, [by_name[name] for name in sorted(by_name)]).columns
    write_whole(path, [json.dumps({"version": VERSION, "columns": columns}).encode()])


def _hash(*values: object) -> str:
    return hashlib.sha256(repr((VERSION, *values)).encode()).hexdigest()[:16]
