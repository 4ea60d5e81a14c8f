"""How a rank writes its tensors: in torch's file format, with a checksum of each file and the disk's word for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.futures import Future

from fusiontrain.train.checkpoint.durable import seal


class CopyingPlanner(dcp.DefaultSavePlanner):
    """Hands out copies of tensors that were on a CUDA device, once they are made; every tensor contiguous, as `CheckingReader` wants them."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[MetadataIndex, torch.Tensor] = {}

    def copy_to_host(self, items: list[WriteItem]) -> bool:
        """Copy what lies on a CUDA device to the host; returns whether that was all of `items`."""
        tensors = {item.index: data for item in items if isinstance(data := self.resolve_data(item), torch.Tensor)}
        self._copies = {index: tensor.detach().cpu() for index, tensor in tensors.items() if tensor.is_cuda}
        return len(self._copies) == len(items)

    def resolve_data(self, write_item: WriteItem) -> Any:
        """What DCP asks for when it writes an item."""
        copy = self._copies.get(write_item.index)
        data = super().resolve_data(write_item) if copy is None else copy
        return data.contiguous() if isinstance(data, torch.Tensor) else data


class SealingWriter(dcp.FileSystemWriter):
    """Writes a rank's files into `folder`, and then seals them: `files` is what the manifest says of them.

    released: called as soon as the tensors may change again. That is when they are copied to the host if they are on a CUDA device, and when the
    system has taken their bytes if they are on the host already: a copy there would cost memory that a training on CPUs has no room for.
    """

    def __init__(self, folder: Path, rank: int, released: Callable[[], None]) -> None:
        super().__init__(folder, sync_files=False)
        self.files: dict[str, dict[str, Any]] = {}
        self._folder, self._rank, self._released = folder, rank, released

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        """What DCP calls on every rank. Raises OSError and RuntimeError where the disk does not take it."""
        assert isinstance(planner, CopyingPlanner)
        if planner.copy_to_host(plan.items):
            self._released()
        with _without_crc32():
            written = super().write_data(plan, planner)
        self._released()
        self.files = seal(sorted(self._folder.glob(f"__{self._rank}_*")))
        return written


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """The zip format of torch.save has a weaker checksum for every tensor, which nothing reads and which takes as long as the writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
