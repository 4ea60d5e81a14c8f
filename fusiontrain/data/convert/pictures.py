"""Pictures that were downloaded before, found by URL or by file name: a table on disk, for there may be hundreds of millions."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fusiontrain.data.convert.layouts import Picture
from fusiontrain.data.formats.pieces import image_suffixes, is_image
from fusiontrain.data.shards import OpenShards, expand_paths
from fusiontrain.data.storage.files import read_exactly
from fusiontrain.data.tar import Member, read_samples
from fusiontrain.utils.errors import UserError

KEY_BYTES = 16


class Row(NamedTuple):
    """A picture's bytes under one of its keys. by_name: the key is a file name, which must be no other picture's."""

    key: bytes
    offset: int
    size: int
    by_name: bool


class PictureTable:
    """Reads the table that `build_table` wrote. A table of no pictures (path None) finds none."""

    def __init__(self, path: Path | None) -> None:
        self._shards = OpenShards()
        self._table = None if path is None else sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        self._files = [] if self._table is None else [Path(name) for (name,) in self._table.execute("SELECT path FROM files ORDER BY id")]

    def find(self, picture: Picture) -> bytes | None:
        """The bytes of a picture: its own, else those of its URL, else those of its name; None where there are none."""
        if picture.data is not None or self._table is None:
            return picture.data
        for key in (_key(kind, name) for kind, name in (("url", picture.url), ("name", picture.name)) if name is not None):
            row = self._table.execute("SELECT file, offset, size FROM pictures WHERE key = ?", (key,)).fetchone()
            if row is not None:
                file, offset, size = row
                return self._shards.file(self._files[file]).read(offset, size)
        return None

    def close(self) -> None:
        self._shards.close()
        if self._table is not None:
            self._table.close()


def build_table(paths: Sequence[str], path: Path) -> str:
    """Write the table of all pictures of those tars and folders to `path`, unless it is there already; returns a hash of what it lists.

    A tar or folder is what img2dataset leaves (`{key}.jpg` and a `{key}.json` with "url"), or pictures under the names that documents call them
    by. Raises UserError where two pictures have one name, for then it would be chance which of them a document gets.
    """
    files = [file for name in paths for file in _picture_files(name)]
    stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat())]
    listing = hashlib.sha256(repr(stats).encode()).hexdigest()
    done = path.with_suffix(".done")
    if path.is_file() and done.is_file() and done.read_text() == listing:
        return listing
    done.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    table = sqlite3.connect(path)
    try:
        table.execute("CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT)")
        table.execute("CREATE TABLE pictures (key BLOB PRIMARY KEY, file INTEGER, offset INTEGER, size INTEGER) WITHOUT ROWID")
        for number, file in enumerate(files):
            table.execute("INSERT INTO files VALUES (?, ?)", (number, str(file)))
            for row in _rows(file):
                _insert(table, row, number, file)
        table.commit()
    finally:
        table.close()
    done.write_text(listing)
    return listing


def _insert(table: sqlite3.Connection, row: Row, number: int, file: Path) -> None:
    added = table.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?, ?, ?)", (row.key, number, row.offset, row.size)).rowcount
    if not added and row.by_name:
        (other,) = table.execute("SELECT path FROM files JOIN pictures ON file = id WHERE key = ?", (row.key,)).fetchone()
        raise UserError(f"{file}: holds a picture of the same name as one of {other}; documents name pictures by it, so rename one or leave one file out")


def _picture_files(name: str) -> list[Path]:
    """Tars, and loose pictures of folders at any depth."""
    if not Path(name).is_dir():
        return expand_paths(name, (".tar",))
    found = [Path(folder) / file for folder, _, files in os.walk(name) for file in files if file.endswith(".tar") or is_image(file.lower())]
    if not found:
        raise UserError(f"{name}: holds neither tars nor pictures")
    return sorted(found, key=os.fsencode)


def _rows(file: Path) -> Iterator[Row]:
    if file.suffix != ".tar":
        about = file.with_suffix(".json")
        url = _url(about.read_bytes()) if about.is_file() else None
        yield Row(_key("name", file.name) if url is None else _key("url", url), 0, file.stat().st_size, url is None)
        return
    with file.open("rb") as opened:
        for sample in read_samples(file):
            about_member = sample.members.get("json")
            url = None if about_member is None else _url(_bytes(opened.fileno(), about_member))
            for suffix in image_suffixes(sample.members):
                member = sample.members[suffix]
                key = _key("name", Path(member.name).name) if url is None else _key("url", url)
                yield Row(key, member.offset, member.size, url is None)


def _bytes(descriptor: int, member: Member) -> bytes:
    return read_exactly(descriptor, member.offset, member.size)


def _url(about: bytes) -> str | None:
    """The URL in the .json that img2dataset writes beside a picture, if it is one."""
    try:
        document = json.loads(about)
    except (ValueError, RecursionError):
        return None
    url = document.get("url") if isinstance(document, dict) else None
    return url if isinstance(url, str) else None


def _key(kind: str, name: str) -> bytes:
    return hashlib.sha256(f"{kind}:{name}".encode(errors="surrogatepass")).digest()[:KEY_BYTES]
