"""Opening a shard of any kind."""

from __future__ import annotations

from pathlib import Path

from fusiontrain.data.storage.files import LocalFile, RemoteFile, ShardFile
from fusiontrain.data.storage.shard import RemoteShard, Shard
from fusiontrain.data.storage.spooled import SpooledFile


def open_shard(shard: Shard) -> ShardFile:
    """The shard's file, from which any number of threads may read. Raises OSError where a local file is not there, UserError for the others."""
    if isinstance(shard, Path):
        return LocalFile(shard)
    return RemoteFile(shard) if isinstance(shard, RemoteShard) else SpooledFile(shard)
