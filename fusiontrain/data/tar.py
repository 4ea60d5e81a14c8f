"""A strict reader of tar shards.

Python's `tarfile` takes a damaged header, a cut at a member boundary or a zeroed block for the end of the archive and drops the rest
without a word. Here each of these is an error that names the shard and the offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from zlib import adler32

from fusiontrain.data.storage.files import ReadAhead, ShardFile
from fusiontrain.data.storage.shard import Shard
from fusiontrain.data.tar_runs import BLOCK, Member, plain_members
from fusiontrain.utils.errors import UserError

HEAD = 3 * BLOCK  # of a member: often a pax header of one block comes before its own
WINDOW = 1 << 16  # bytes to look for headers in, of a file that has none at hand
CHECKSUM, SPACES = slice(148, 156), 8 * 32  # what counts for it in itself is eight spaces
GZIP = b"\x1f\x8b"
REGULAR, LONG_NAME, PAX = (b"0", b"\0"), b"L", b"x"
COMMENTS = (b"g", b"K")  # pax for the whole tar, and the long name of a link's target: of no use here
LINKS = (b"1", b"2")  # what GNU tar makes of a file that it has met before
NOT_FILES = (b"3", b"4", b"5", b"6")  # devices, folders, pipes


class TarSample(NamedTuple):
    """Neighbouring members of one key: the name up to the first dot of its last part. Suffixes are what follows, in lower case."""

    key: str
    members: dict[str, Member]


def members_in(file: ShardFile, path: Shard) -> Iterator[Member]:
    """Every regular file of an open tar (ustar, pax and GNU long names), in order. Raises UserError at the first damage."""
    position, long_name = 0, None
    first, head = 0, b""  # what was read last, and from where
    pax_header, pax_length = b"", 0  # Python writes the same one, but for its checksum and size, before every member
    while True:
        if long_name is None:
            window = _window(file, position)
            run, length = plain_members(window, position, file.size)
            yield from run
            position += length
        header = head[position - first : position - first + BLOCK]
        if len(header) < BLOCK:
            if position + BLOCK > file.size:
                raise _damage(path, position, "the file ends without the two empty blocks that end a tar")
            first, head = position, file.read(position, min(HEAD, file.size - position))
            header = head[:BLOCK]
        if not header[0] and not header.strip(b"\0"):
            _check_end(path, file, position)
            return
        length = pax_length if header == pax_header else _check_header(path, header, position)
        kind, start = header[156:157], position + BLOCK
        following = start + -(-length // BLOCK) * BLOCK
        if following > file.size:
            raise _damage(path, position, f"a member of {length} bytes goes beyond the end of the file")
        if kind in REGULAR:
            yield Member(long_name or _name(header), start, length)
            long_name = None
        elif kind == PAX:
            within = start - first
            records = head[within : within + length] if within + length <= len(head) else file.read(start, length)
            long_name = _pax_path(path, records, position) or long_name
            pax_header, pax_length = header, length
        elif kind == LONG_NAME:
            long_name = _text(file.read(start, length).rstrip(b"\0"))
        elif kind in LINKS:
            raise _damage(path, position, f"member {long_name or _name(header)} is a link; write the shard with files alone (tar -h --hard-dereference)")
        elif kind in NOT_FILES:
            long_name = None
        elif kind not in COMMENTS:
            raise _damage(path, position, f"members of type {kind!r} are not supported")
        position = following


def samples_in(file: ShardFile, path: Shard) -> Iterator[TarSample]:
    """The samples of an open webdataset shard. Raises UserError where the members of a sample are not neighbours or a name comes twice."""
    seen: set[str] = set()
    key: str | None = None
    stem_and_dot = ""
    members: dict[str, Member] = {}
    for member in members_in(file, path):
        suffix = member.name[len(stem_and_dot) :]
        if key is None or not member.name.startswith(stem_and_dot) or "/" in suffix:  # few do not belong to the sample of the one before
            folder, _, base = member.name.removeprefix("./").rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not dot or not stem:
                continue
            stem_and_dot = member.name[: len(member.name) - len(suffix)]
            this_key = f"{folder}/{stem}" if folder else stem
            if this_key != key:
                if key is not None:
                    yield TarSample(key, members)
                if this_key in seen:
                    raise UserError(f"{path}: sample {this_key!r} at offset {member.offset}: its members are not neighbours, write the shard anew")
                seen.add(this_key)
                key, members = this_key, {}
        lower = suffix.lower()
        if lower in members:
            raise UserError(f"{path}: sample {key!r}: member .{suffix} comes twice, the second at offset {member.offset}")
        members[lower] = member
    if key is not None:
        yield TarSample(key, members)


def _window(file: ShardFile, position: int) -> memoryview:
    """What lies from there on in memory that is at hand; it may be less than a header, and changes with the next read."""
    return file.window(position) if isinstance(file, ReadAhead) else memoryview(file.read(position, min(WINDOW, max(0, file.size - position))))


def _check_header(path: Shard, header: bytes, position: int) -> int:
    """The member's size, after the header's checksum was found right."""
    checksum, field = header[CHECKSUM], header[124:136]
    try:
        stored = int(checksum.rstrip(b"\0 ").lstrip() or b"0", 8)
        length = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ").lstrip() or b"0", 8)
    except ValueError as error:
        if header.startswith(GZIP):
            raise UserError(f"{path}: is compressed by gzip; name it .tar.gz") from error
        raise _damage(path, position, "a header is unreadable") from error
    if length < 0:
        raise _damage(path, position, "a header is unreadable")
    if stored != _sum(header) - _sum(checksum) + SPACES:
        raise _damage(path, position, "a header does not match its checksum")
    return length


def _sum(part: bytes) -> int:
    """The sum of at most 512 bytes: of ASCII, which is at most 512 * 127, it is the lower half of their Adler-32, a sum modulo 65521, less 1."""
    return (adler32(part) & 0xFFFF) - 1 if part.isascii() else sum(part)


def _check_end(path: Shard, file: ShardFile, position: int) -> None:
    """What follows the first empty block: at least one more, and nothing else."""
    if position + 2 * BLOCK > file.size:
        raise _damage(path, position, "the file ends after one empty block, a tar ends with two")
    place, step = position + BLOCK, 1 << 20  # not all at once: behind a zeroed block lies the rest of a large shard
    while place < file.size:
        if file.read(place, min(step, file.size - place)).strip(b"\0"):
            raise _damage(path, position, "bytes follow an empty block, which ends a tar: part of the file was overwritten, or something was appended")
        place += step


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[345] and header[257:264] == b"ustar\0" + b"0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    """A name as text; bytes that are not UTF-8 stay apart and printable."""
    return name.decode(errors="backslashreplace")


def _pax_path(path: Shard, records: bytes, position: int) -> str | None:
    """The `path` of a pax header: records of `<length> <key>=<value>\\n`, of which the header's checksum knows nothing."""
    found = None
    while records:
        digits, _, _ = records.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record, records = records[:length], records[length:]
        key, equals, value = record[len(digits) + 1 :].partition(b"=")
        if len(record) < length or not equals or not value.endswith(b"\n"):
            raise _damage(path, position, "a pax header is unreadable")
        if key == b"path":
            found = _text(value[:-1])
    return found


def _damage(path: Shard, position: int, what: str) -> UserError:
    return UserError(f"{path}: damaged at offset {position}: {what}; fetch or write the shard anew")
