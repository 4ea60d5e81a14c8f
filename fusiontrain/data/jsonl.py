"""JSON lines, read where they lie: a line is a sample whose only member is its `json`, so all that holds for tars holds for it."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from fusiontrain.data.tar import Member, TarSample, read_samples
from fusiontrain.utils.errors import UserError

SUFFIX = ".jsonl"
LONGEST_LINE = 1 << 28
"""In bytes. A line is held in memory, and a longer one is a file without line ends rather than a document."""


def shard_samples(path: Path) -> Iterator[TarSample]:
    """The samples of a shard: the lines of a `.jsonl`, else those of a tar. Raises UserError for damage."""
    return read_lines(path) if path.suffix.lower() == SUFFIX else read_samples(path)


def read_lines(path: Path) -> Iterator[TarSample]:
    """A sample for every line that is not blank, with the key `line-<number from 1>`. Line ends (LF or CRLF) and a byte order mark at the start
    are no part of a line; the last one needs no end. Raises UserError for a line longer than LONGEST_LINE."""
    with path.open("rb") as file:
        offset, number = 0, 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}: line {number} at offset {offset} is longer than {LONGEST_LINE} bytes; is this JSON, one document a line?")
            begin = len(codecs.BOM_UTF8) if not offset and line.startswith(codecs.BOM_UTF8) else 0
            content = line[begin:].rstrip(b"\r\n")
            if content.strip():
                yield TarSample(f"line-{number}", {"json": Member("json", offset + begin, len(content))})
            offset += len(line)
