"""Writes that a loss of power does not undo, and the checksum of what was written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

CHECKSUM = "xxh3_128"
"""Key of a file's checksum in the manifest. It guards against accidents, at the speed of memory; sha256 would be slower than the disks."""

CHUNK_BYTES = 1 << 22
THREADS = 4


def checksum_of(path: Path) -> str:
    """xxh3 (128 bits) of a file's content, in hexadecimal digits."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until the disk has its content (its name: `sync`)."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or the names of a folder's files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What the manifest says of each of these files, by name, once the disk has them. Checksums are taken while the disk works."""
    with ThreadPoolExecutor(THREADS) as pool:
        synced = [pool.submit(sync, path) for path in paths]
        entries = {path.name: {"size": path.stat().st_size, CHECKSUM: checksum_of(path)} for path in paths}
        for one in synced:
            one.result()
    return entries
