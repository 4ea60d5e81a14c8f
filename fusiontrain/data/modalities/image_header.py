"""Width and height of an image from the first bytes of its file, without a decoder: what indexing needs of millions of pictures.

What is not JPEG, PNG, GIF or WebP, or is odd in its header, is left to Pillow by the caller.
"""

from __future__ import annotations

import struct
from functools import lru_cache

HEADER_BYTES = 1 << 17
"""Where EXIF data of a JPEG or PNG begin, if there are any: behind at most one segment of 64 KiB."""
APP1 = b"\xff\xe1"  # the marker of the segments that hold EXIF and XMP data
JPEG_MAGIC = b"\xff\xd8"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers, SOF0 to SOF15 without DHT (C4), JPG (C8) and DAC (CC), which share their range.
SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SOS_MAGIC = b"\xff\xda"
LONGEST_REMEMBERED, REMEMBERED = 2048, 1024  # bytes of a header, and how many of them
SOS, EOI, STANDALONE = 0xDA, 0xD9, frozenset([0x01, *range(0xD0, 0xD9)])
TABLES = frozenset([0xC4, 0xDB, 0xDD, 0xE0])  # the most frequent segments: DHT, DQT, DRI, and the APP0 of JFIF
SEGMENT, SIDES = struct.Struct(">BBH"), struct.Struct(">HH")  # 0xFF, marker, length from here on; height and width


def header_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels as stored, before any EXIF rotation; None where the header is of another kind, cut, or names a side of 0."""
    if data[:2] == JPEG_MAGIC:
        size = _jpeg(data)[0]
    elif data[:8] == PNG_MAGIC and data[12:16] == b"IHDR" and len(data) >= 24:
        size = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        size = _gif(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size = _webp(data)
    else:
        return None
    return size if size is not None and size[0] > 0 and size[1] > 0 else None


def plain_size(data: bytes) -> tuple[int, int] | None:
    """As `header_size`, but None where `has_exif` too: the size of a picture that is upright as it is stored."""
    if data[:2] == JPEG_MAGIC:  # most images are, and one walk tells both
        size, exif = _jpeg(data)
        return None if exif or size is None or 0 in size else size
    return None if has_exif(data) else header_size(data)


def has_exif(data: bytes) -> bool:
    """Whether there may be EXIF or XMP data, which may say that the picture is to be turned; some files without any are taken for such."""
    if data[:2] == JPEG_MAGIC:
        return _jpeg(data)[1]
    if data[12:16] == b"VP8X":
        return bool(data[20:21] and data[20] & 0x08)
    head = data[:HEADER_BYTES]
    return b"Exif\0" in head or b"eXIf" in head


def _jpeg(data: bytes) -> tuple[tuple[int, int] | None, bool]:
    """The size, and whether there may be EXIF or XMP data, which only stand before the pixels."""
    # An encoder writes the same header before all pictures of a size, so what the last one said is remembered, and where it ended.
    end = _last_end[0]
    if data[end : end + 2] == SOS_MAGIC and (found := _remembered(data[: end + 9])) is not None:
        return found
    size, exif, end = _walk(data)
    if 0 < end < LONGEST_REMEMBERED:
        _last_end[0] = end
    return size, exif


_last_end = [0]  # only a guess, so threads may share it


@lru_cache(REMEMBERED)
def _remembered(head: bytes) -> tuple[tuple[int, int] | None, bool] | None:
    """What the first bytes of a JPEG tell, if they reach its pixels: then nothing behind them matters."""
    size, exif, end = _walk(head)
    return (size, exif) if end else None


def _walk(data: bytes) -> tuple[tuple[int, int] | None, bool, int]:
    """The size, whether there may be EXIF or XMP data, and where the pixels begin, 0 if the walk did not reach them.

    It goes from marker to marker by their lengths, so a thumbnail inside an APP segment (a JPEG of its own) is passed over.
    """
    size, exif, position, last = None, False, 2, len(data) - 9
    while position <= last:
        fill, marker, length = SEGMENT.unpack_from(data, position)
        if fill != 0xFF or marker == EOI:
            break
        if marker in TABLES:
            position += 2 + length
            continue
        if marker == SOS:
            return size, exif, position
        if marker in SOF and size is None:
            size = SIDES.unpack_from(data, position + 5)
        exif |= marker == APP1[1]
        position += 1 if marker == 0xFF else 2 if marker in STANDALONE else 2 + length  # 0xFF: fill bytes may stand before a marker
    return size, data.find(APP1, 0, HEADER_BYTES) >= 0, 0  # the walk did not reach the pixels, which never hold a marker


def _gif(data: bytes) -> tuple[int, int] | None:
    return (int.from_bytes(data[8:10], "little"), int.from_bytes(data[6:8], "little")) if len(data) >= 10 else None


def _webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if len(data) < 30:
        return None
    if kind == b"VP8X":  # width - 1 and height - 1 of the canvas, 24 bits each
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if kind == b"VP8L" and data[20] == 0x2F:  # 14 bits each
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":  # the upper two bits are a scale for display
        return int.from_bytes(data[28:30], "little") & 0x3FFF, int.from_bytes(data[26:28], "little") & 0x3FFF
    return None
