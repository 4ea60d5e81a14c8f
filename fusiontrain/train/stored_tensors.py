"""The tensors of a sharded checkpoint, read whole and one at a time, in one process, on the CPU.

torch.distributed.checkpoint loads into tensors that are there already, so what it loads lies in memory twice. Here a tensor that one rank wrote is
read once, and one that many wrote is put together from its shards, of which one is in memory at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view  # with which torch reads these files


class StoredTensors:
    """The tensors of a checkpoint folder; its files must have been verified."""

    def __init__(self, checkpoint: Path) -> None:
        self._folder = checkpoint
        metadata = FileSystemReader(checkpoint).read_metadata()
        self._tensors, self._places = metadata.state_dict_metadata, metadata.storage_data

    def read(self, key: str) -> torch.Tensor:
        """The tensor of the name `group.name`, whatever ranks hold parts of it. KeyError where there is none."""
        entry = self._tensors[key]
        shards = [(chunk, self._places[MetadataIndex(key, chunk.offsets)]) for chunk in entry.chunks]
        if len(shards) == 1:
            return self._load(shards[0][1])
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk, place in shards:
            inside = tuple(slice(start, start + length) for start, length in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[inside] = self._load(place)
        return whole

    def _load(self, place: Any) -> torch.Tensor:
        with (self._folder / place.relative_path).open("rb") as file:
            return torch.load(_create_file_view(file, place.offset, place.length), map_location="cpu", weights_only=True)
