"""Members of the plain kind that Python and GNU tar write for files with short names, many at once and at a third of what one costs in `tar.py`.

Nothing is believed here that is not there: each header has the checksum that it says. Whatever is odd or damaged ends a run and is left to
`tar.py`, which says what is wrong.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple
from zlib import adler32

BLOCK = 512
NAME_END, SIZE, SIZE_END, CHECKSUM, CHECKSUM_END, KIND, PREFIX = 100, 124, 135, 148, 156, 156, 345  # where these fields begin and end
REGULAR, PAX = (ord("0"), 0), ord("x")
SPACES = 8 * ord(" ")  # what the checksum counts for in itself
TERMINATORS = (0, ord(" "))
ONLY_A_TIME = [b"%d mtime=" % length for length in range(BLOCK + 1)]  # how pax records begin that are one, of the time of change
REMEMBERED = 1 << 12  # of what shards repeat: headers of pax records, and checksums


class Member(NamedTuple):
    """A file in a tar: where its bytes lie, and their CRC32 once an index has read them."""

    name: str
    offset: int
    size: int
    crc: int | None = None


def plain_members(data: memoryview, offset: int, file_size: int) -> tuple[list[Member], int]:
    """Members from the start of `data` on, and how many bytes they take; none where the first one is not plain.

    data: a part of a tar of `file_size` bytes, from the header at `offset` on.
    """
    found: list[Member] = []
    new = tuple.__new__  # as `Member(...)`, in a third of the time
    position = 0
    while True:
        start = position + BLOCK
        headers = data[position : position + 3 * BLOCK].tobytes()
        header = headers[:BLOCK]
        if len(header) == BLOCK and header[KIND] == PAX:
            size = _pax_size(header)
            records, header = headers[BLOCK : BLOCK + max(size, 0)], headers[2 * BLOCK :]
            start += 2 * BLOCK
            if not (0 < size <= BLOCK and records.startswith(ONLY_A_TIME[size]) and records.endswith(b"\n")):
                break
        if len(header) < BLOCK or header[KIND] not in REGULAR or not header[0] or header[PREFIX]:
            break
        size = _size(header)
        following = start + -(-size // BLOCK) * BLOCK
        if size < 0 or offset + following > file_size:
            break
        name = header[:NAME_END].partition(b"\0")[0]
        found.append(new(Member, (name.decode("utf-8", "backslashreplace"), offset + start, size, None)))
        position = following
    return found, position


def _size(header: bytes) -> int:
    """The size that a sound header of ASCII gives; -1 for any other."""
    # Of ASCII, at most 512 * 127, the lower half of the Adler-32 is the sum of the bytes plus 1, modulo 65521.
    if (adler32(header) & 0xFFFF) - 1 != _sum(header[CHECKSUM:CHECKSUM_END]) or not header.isascii() or header[SIZE_END] not in TERMINATORS:
        return -1
    try:
        return int(header[SIZE:SIZE_END], 8)
    except ValueError:
        return -1


_pax_size = lru_cache(REMEMBERED)(_size)  # the same few headers of pax records come before all members


@lru_cache(REMEMBERED)
def _sum(checksum: bytes) -> int:
    """What the bytes of a header with that checksum field add up to; -1 where the field is not six octal digits, NUL and space."""
    try:
        stored = int(checksum[:6], 8)
    except ValueError:
        return -1
    return stored - SPACES + sum(checksum) if checksum == b"%06o\0 " % stored else -1
