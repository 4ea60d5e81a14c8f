"""Shards without random access: compressed tars and the output of commands, read from the cache folder that they are written to first."""

from __future__ import annotations

import gzip
import io
import logging
import os
import select
import shutil
import signal
import subprocess
import tempfile
import zlib
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from fusiontrain.data.storage.files import FileStream, LocalFile, RemoteFile, ShardFile, read_exactly
from fusiontrain.data.storage.shard import GzipShard, PipeShard, digest, scrubbed, state, user_cache
from fusiontrain.data.storage.spool import Spool
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

CHUNK = 4 << 20
TAR_END = bytes(1024)


class SpooledFile:
    """The tar that a GzipShard or PipeShard gives. It is made again where it has been removed from the cache folder in the meantime."""

    far = False

    def __init__(self, shard: GzipShard | PipeShard) -> None:
        settings = shard.settings
        self.shard = shard
        self._spool = Spool(Path(settings.cache_dir) if settings.cache_dir else user_cache() / "spool", settings.cache_bytes)
        self._key = digest(repr((str(shard), *state(shard))))
        descriptor, self._written = self._open()
        with os.fdopen(descriptor, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        descriptor, written = self._open()
        try:
            if written and self._written:
                logger.warning("%s: made again for the cache folder; more data.storage.cache_bytes would keep it", self.shard)
            self._written |= written
            found = os.fstat(descriptor).st_size
            if found != self.size:
                raise UserError(f"{self.shard}: gives {found} bytes now and gave {self.size} before; a shard must not change during a run")
            return read_exactly(descriptor, offset, size)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        pass

    def _open(self) -> tuple[int, bool]:
        return self._spool.open(self._key, str(self.shard), lambda: content_of(self.shard))


class ChunkStream(io.RawIOBase):
    """Chunks as a stream, each made when the one before it has been read. Where one fails the stream ends, so that what came before it is
    read, and `failure` says why."""

    failure: UserError | None = None

    def __init__(self, chunks: Generator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                chunk = next(self._chunks, None)
            except UserError as error:
                self.failure, chunk = error, None
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def content_of(shard: GzipShard | PipeShard) -> Generator[bytes]:
    """The bytes of the tar that it gives, in chunks. Raises UserError where they are damaged or the command fails."""
    return gunzipped(shard) if isinstance(shard, GzipShard) else output_of(shard)


def gunzipped(shard: GzipShard) -> Generator[bytes]:
    """The decompressed bytes, in chunks. Raises UserError where they are damaged."""
    origin = shard.origin
    file: ShardFile = LocalFile(origin) if isinstance(origin, Path) else RemoteFile(origin)
    with closing(file), gzip.GzipFile(fileobj=io.BufferedReader(FileStream(file), CHUNK)) as stream:
        while True:
            try:
                chunk = stream.read(CHUNK)
            except (EOFError, OSError, zlib.error) as error:
                raise UserError(f"{shard}: cannot be decompressed ({error}); fetch or write the shard anew") from error
            if not chunk:
                return
            yield chunk


def output_of(shard: PipeShard) -> Generator[bytes]:
    """What the command writes, in chunks. Raises UserError where it fails, stops for too long, or its output does not end as a tar does."""
    shell = ["bash", "-o", "pipefail", "-c"] if shutil.which("bash") else ["sh", "-c"]  # else the end of a pipeline hides that its begin failed
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [*shell, shard.command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True
        )
        assert process.stdout is not None
        try:
            tail = b""
            for chunk in _chunks(shard, process.stdout.fileno()):
                tail = (tail + chunk)[-len(TAR_END) :]
                yield chunk
            status = process.wait(shard.settings.timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{shard}: the command has closed its output but does not end") from error
        finally:
            process.stdout.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            raise UserError(f"{shard}: the command ended with status {status}{_last_line(complaints)}")
        if tail != TAR_END:
            raise UserError(f"{shard}: the command's output does not end as a tar does{_last_line(complaints)}")


def _chunks(shard: PipeShard, descriptor: int) -> Generator[bytes]:
    """The output in chunks of CHUNK bytes, as long as there is some within `data.storage.timeout_seconds`."""
    parts: list[bytes] = []
    size = 0
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        if not waiting.poll(1000 * shard.settings.timeout_seconds):
            raise UserError(f"{shard}: the command wrote nothing for {shard.settings.timeout_seconds:g} seconds (data.storage.timeout_seconds)")
        part = os.read(descriptor, CHUNK)
        parts.append(part)
        size += len(part)
        if size >= CHUNK or not part:
            yield b"".join(parts)
            parts, size = [], 0
        if not part:
            return


def _last_line(complaints: io.BufferedRandom) -> str:
    complaints.seek(0)
    lines = complaints.read().decode(errors="backslashreplace").split("\n")
    said = next((line for line in reversed(lines) if line.strip()), "")
    return f": {scrubbed(said)[:200]}" if said else ""
