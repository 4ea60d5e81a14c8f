"""The records of a dataset's files: parquet, JSON lines (plain, gzip or zip), and the .json members of tars."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fusiontrain.data.errors import BadSample
from fusiontrain.data.shards import expand_paths
from fusiontrain.data.storage.files import read_exactly
from fusiontrain.data.tar import read_samples
from fusiontrain.utils.errors import UserError

ROWS_AT_ONCE = 256
Records = Iterator[dict[str, Any] | BadSample]
"""A record, or why it is none, for each row or line; so a record's number is its place in the file."""


def source_files(path: str) -> list[Path]:
    """The files that `path` means: one, a folder of them, a glob or a brace range; sorted by bytes. Raises UserError when there is none."""
    files = expand_paths(path, tuple(READERS))
    for file in files:
        _reader(file)
    return files


def read_records(path: Path) -> Records:
    """Every record of a file. Raises UserError where the file itself is damaged."""
    try:
        yield from _reader(path)(path)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); fetch it anew") from error


def _reader(path: Path) -> Callable[[Path], Records]:
    for suffix, reader in READERS.items():
        if path.name.lower().endswith(suffix):
            return reader
    raise UserError(f"{path}: not one of {', '.join(READERS)}")


def _parquet(path: Path) -> Records:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install -c constraints.txt 'fusiontrain[parquet]'") from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is not parquet or damaged ({error}); fetch it anew") from error


def _lines(file: Iterable[bytes]) -> Records:
    for line in file:
        if line.strip():
            yield _parse(line)


def _plain(path: Path) -> Records:
    with path.open("rb") as file:
        yield from _lines(file)


def _gzip(path: Path) -> Records:
    with gzip.open(path, "rb") as file:
        yield from _lines(file)


def _zip(path: Path) -> Records:
    """The lines of every file in the archive, in its order."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                yield from _lines(file)


def _tar(path: Path) -> Records:
    with path.open("rb") as file:
        for sample in read_samples(path):
            member = sample.members.get("json")
            if member is None:
                yield BadSample(f"sample {sample.key!r} has no .json member")
            else:
                yield _parse(read_exactly(file.fileno(), member.offset, member.size))


def _parse(data: bytes) -> dict[str, Any] | BadSample:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        return BadSample(f"is not valid JSON ({error})")
    return record if isinstance(record, dict) else BadSample("is not a JSON object")


READERS: dict[str, Callable[[Path], Records]] = {
    ".parquet": _parquet, ".jsonl": _plain, ".jsonl.gz": _gzip, ".jsonl.zip": _zip, ".json.gz": _gzip, ".tar": _tar,
}  # fmt: skip
