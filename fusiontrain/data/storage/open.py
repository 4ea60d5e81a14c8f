"""Opening a shard of any kind."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fusiontrain.data.storage.files import FileStream, LocalFile, ReadAhead, RemoteFile, ShardFile
from fusiontrain.data.storage.shard import GzipShard, PipeShard, RemoteShard, Shard
from fusiontrain.data.storage.spooled import ChunkStream, SpooledFile, content_of

BUFFER = 1 << 20


def open_shard(shard: Shard) -> ShardFile:
    """The shard's file, from which any number of threads may read. Raises OSError where a local file is not there, UserError for the others."""
    if isinstance(shard, Path):
        return LocalFile(shard)
    return RemoteFile(shard) if isinstance(shard, RemoteShard) else SpooledFile(shard)


@contextmanager
def stream_of(shard: Shard) -> Iterator[io.BufferedReader]:
    """The shard's bytes to be read once, from front to back, kept nowhere; raises as `open_shard`, and reads as its file does.

    Where a command fails, its output ends and the UserError is raised at the end of the context; it is known to whoever has read to the end.
    """
    if isinstance(shard, GzipShard | PipeShard):
        with closing(content_of(shard)) as chunks:
            stream = ChunkStream(chunks)
            try:
                yield io.BufferedReader(stream, BUFFER)
            except Exception as error:  # a reader may stumble over the early end
                if stream.failure is None:
                    raise
                raise stream.failure from error
            if stream.failure is not None:
                raise stream.failure
    else:
        with closing(ReadAhead(open_shard(shard))) as file:
            yield io.BufferedReader(FileStream(file), BUFFER)
