"""A rank's piece of a tensor that was cut without regard to its rows, as torch's checkpoints store and load it.

DeepSpeed lays parameters end to end and cuts the line at equal lengths. Checkpoints store boxes of whole tensors, so that any number of
ranks and any engine can read them: a piece of the line is a few boxes, at most two for every dim and one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) of a rectangular part of a tensor, one of each per dim."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements [start, stop) of a flattened tensor of `shape`, as boxes in their order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, inside = divmod(start, row)
    if inside or stop - start < row:  # a part of one row
        end = min(stop, (first + 1) * row)
        for offsets, sizes in boxes(shape[1:], inside, end - first * row):
            yield (first, *offsets), (1, *sizes)
    else:
        rows = (stop - start) // row
        end = start + rows * row
        yield (first, *(0 for _ in shape[1:])), (rows, *shape[1:])
    yield from boxes(shape, end, stop)


class FlatShard(torch.Tensor):
    """The elements [start, start + len(local)) of a flattened tensor of `shape`; `local` may be empty.

    It shares the storage of `local`, so loading a checkpoint into it loads what `local` is a view of. It has the shape and dtype of the
    whole but no values to compute with: every operation on it raises TypeError. Take `to_local()`, or `full_tensor()` on all ranks.
    """

    local: torch.Tensor
    start: int

    @staticmethod
    def __new__(cls, shape: torch.Size, start: int, local: torch.Tensor) -> FlatShard:
        assert local.ndim == 1 and local.is_contiguous() and 0 <= start <= start + len(local) <= max(start, math.prod(shape))
        shard = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        shard.local, shard.start = local.detach(), start
        return shard

    def __init__(self, shape: torch.Size, start: int, local: torch.Tensor) -> None: ...

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FlatShard(shape={tuple(self.shape)}, elements {self.start} to {self.start + len(self.local)})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{operation}: this rank holds only a piece of the tensor, take to_local() or full_tensor()")

    def to_local(self) -> torch.Tensor:
        """This rank's elements, [n]."""
        return self.local

    def full_tensor(self) -> torch.Tensor:
        """The whole tensor, gathered from all ranks, which call this together."""
        whole = torch.zeros(math.prod(self.shape), dtype=self.dtype, device=self.device)
        whole[self.start : self.start + len(self.local)] = self.local
        dist.all_reduce(whole)
        return whole.view(self.shape)

    def _pieces(self) -> Iterator[tuple[ChunkStorageMetadata, torch.Tensor]]:
        place = 0
        for offsets, sizes in boxes(tuple(self.shape), self.start, self.start + len(self.local)):
            length = math.prod(sizes)
            yield ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)), self.local[place : place + length].view(sizes)
            place += length

    # What torch.distributed.checkpoint asks of a tensor that is spread over ranks.

    def __create_write_items__(self, name: str, tensor: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, self.size()))
            for chunk, _ in self._pieces()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._pieces()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(piece for chunk, piece in self._pieces() if chunk.offsets == index.offset)
