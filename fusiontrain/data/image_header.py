"""Width and height of an image from the first bytes of its file, without a decoder: what indexing needs of millions of pictures.

What is not JPEG, PNG, GIF or WebP, or is odd in its header, is left to Pillow by the caller.
"""

from __future__ import annotations

HEADER_BYTES = 1 << 17
"""Where EXIF data of a JPEG or PNG begin, if there are any: behind at most one segment of 64 KiB."""
APP1 = b"\xff\xe1"  # the marker of the segments that hold EXIF and XMP data
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers, SOF0 to SOF15 without DHT (C4), JPG (C8) and DAC (CC), which share their range.
SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SOS, EOI, STANDALONE = 0xDA, 0xD9, frozenset([0x01, *range(0xD0, 0xD9)])


def header_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels as stored, before any EXIF rotation; None where the header is of another kind, cut, or names a side of 0."""
    if data[:2] == b"\xff\xd8":
        size = _jpeg(data)
    elif data[:8] == PNG_MAGIC and data[12:16] == b"IHDR" and len(data) >= 24:
        size = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        size = _gif(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size = _webp(data)
    else:
        return None
    return size if size is not None and size[0] > 0 and size[1] > 0 else None


def has_exif(data: bytes) -> bool:
    """Whether there may be EXIF or XMP data, which may say that the picture is to be turned; some files without any are taken for such."""
    if data[:2] == b"\xff\xd8":
        return data.find(APP1, 0, HEADER_BYTES) >= 0  # compressed pixels never hold a marker
    if data[12:16] == b"VP8X":
        return bool(data[20:21] and data[20] & 0x08)
    head = data[:HEADER_BYTES]
    return b"Exif\0" in head or b"eXIf" in head


def _jpeg(data: bytes) -> tuple[int, int] | None:
    """Walks from marker to marker by their lengths, so a thumbnail inside an APP segment (a JPEG of its own) is passed over."""
    position = 2
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill bytes may stand before a marker
            position += 1
        elif marker in STANDALONE:
            position += 2
        elif marker in SOF:
            return int.from_bytes(data[position + 5 : position + 7], "big"), int.from_bytes(data[position + 7 : position + 9], "big")
        elif marker in (SOS, EOI):
            return None
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


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
