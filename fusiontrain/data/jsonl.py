"""JSON lines, read where they lie: a line is a sample whose only member is its `json`, so all that holds for tars holds for it."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import closing

from fusiontrain.data.storage.files import FileStream, ReadAhead, ShardFile
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.storage.shard import Shard
from fusiontrain.data.tar import Member, TarSample, samples_in
from fusiontrain.utils.errors import UserError

SUFFIX = ".jsonl"
LONGEST_LINE = 1 << 28
"""In bytes. A line is held in memory, and a longer one is a file without line ends rather than a document."""


def samples_of(file: ShardFile, path: Shard) -> Iterator[TarSample]:
    """The samples of an open shard: the lines of a `.jsonl`, else those of a tar. Raises UserError for damage."""
    return lines_in(file, path) if str(path).lower().removesuffix(".gz").endswith(SUFFIX) else samples_in(file, path)


def shard_samples(path: Shard) -> Iterator[TarSample]:
    """As `samples_of`, of a shard that is opened for it and read from front to back."""
    with closing(ReadAhead(open_shard(path))) as file:
        yield from samples_of(file, path)


def lines_in(file: ShardFile, path: Shard) -> Iterator[TarSample]:
    """A sample for every line that is not blank, with the key `line-<number from 1>`. Line ends (LF or CRLF) and a byte order mark at the start
    are no part of a line; the last one needs no end. Raises UserError for a line longer than LONGEST_LINE."""
    stream = io.BufferedReader(FileStream(file))
    offset, number = 0, 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}: line {number} at offset {offset} is longer than {LONGEST_LINE} bytes; is this JSON, one document a line?")
        begin = len(codecs.BOM_UTF8) if not offset and line.startswith(codecs.BOM_UTF8) else 0
        content = line[begin:].rstrip(b"\r\n")
        if content.strip():
            yield TarSample(f"line-{number}", {"json": Member("json", offset + begin, len(content))})
        offset += len(line)
