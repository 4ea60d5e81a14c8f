"""How a rank reads tensors: from the disk straight into their place, and checking the file in the same pass."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from fusiontrain.train.checkpoint.durable import CHUNK_BYTES

HEAD_BYTES = 1 << 12
CONTENT = b"archive/data/0"
"""What torch.save calls a tensor's bytes in its zip format. The name comes right before them, within `HEAD_BYTES`."""


class CheckingReader(dcp.FileSystemReader):
    """Reads what `SealingWriter` wrote, each file from its beginning to its end: without the copies that torch's reader makes of every tensor, and
    without its jumps to the end of a tensor before its beginning, which put the system's reading ahead out of step.

    check: names of files to be read whole if any tensor of theirs is wanted. After the load, `checksums` has those that were.
    """

    def __init__(self, checkpoint: Path, check: Collection[str]) -> None:
        super().__init__(checkpoint)
        self.checksums: dict[str, str] = {}
        self._folder, self._check = checkpoint, check
        self._tensors: dict[str, Any] = {}

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        """What DCP calls on every rank before it plans."""
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future:
        """What DCP calls on every rank. Raises whatever damaged bytes may make of torch's unpacking."""
        wanted: dict[str, dict[MetadataIndex, list[ReadItem]]] = {}
        for item in sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].offset):
            place = self.storage_data[item.storage_index]
            wanted.setdefault(place.relative_path, {}).setdefault(item.storage_index, []).append(item)
        for name, of_file in wanted.items():
            with _Pass(self._folder / name, checked=name in self._check) as file:
                for index, items in of_file.items():
                    _read(file, file.content_of(self.storage_data[index].offset), self._stored(index), items, planner)
                if (checksum := file.finish()) is not None:
                    self.checksums[name] = checksum
        done: Future = Future()
        done.set_result(None)
        return done

    def _stored(self, index: MetadataIndex) -> torch.Tensor:
        """A tensor, or the part of it that one rank wrote, without its content, on the meta device."""
        tensor = self._tensors[index.fqn]
        sizes = next(chunk.sizes for chunk in tensor.chunks if chunk.offsets == index.offset)
        return torch.empty(sizes, dtype=tensor.properties.dtype, device="meta")


def _read(file: _Pass, first: int, stored: torch.Tensor, wanted: list[ReadItem], planner: LoadPlanner) -> None:
    """Read the tensor whose bytes begin at `first`, and give each of the items that ask for it, or for a part of it, what it asks for."""
    targets = [planner.resolve_tensor(item).detach() for item in wanted]
    if len(targets) == 1 and _same_memory(targets[0], stored):
        file.read_into(targets[0], first)
    else:
        whole = torch.empty_like(stored, device="cpu")
        file.read_into(whole, first)
        for item, target in zip(wanted, targets, strict=True):
            part = whole[tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))]
            if part.shape != target.shape:
                raise ValueError(f"{item.storage_index}: has the shape {tuple(part.shape)} there and {tuple(target.shape)} here")
            target.copy_(part)
    for item, target in zip(wanted, targets, strict=True):
        planner.commit_tensor(item, target)


def _same_memory(target: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether the bytes of `stored` are those that `target` is to have, in the same order."""
    return (target.dtype, target.shape, target.device.type) == (stored.dtype, stored.shape, "cpu") and target.is_contiguous()


class _Pass:
    """One reading of a file, from its beginning to its end if it is to be checked, else only of what is asked for."""

    def __init__(self, path: Path, checked: bool) -> None:
        self._file = path.open("rb", buffering=0)
        self._place = 0
        self._digest = xxhash.xxh3_128() if checked else None

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def content_of(self, place: int) -> int:
        """Where the bytes of the tensor begin that torch.save wrote at `place`: behind the name of their entry and as many bytes as stand before it."""
        head = os.pread(self._file.fileno(), HEAD_BYTES, place)
        name = head.find(CONTENT)
        if name < 0:
            raise ValueError(f"{self._file.name}: has no tensor at {place}")
        return place + name + len(CONTENT) + int.from_bytes(head[name - 2 : name], "little")

    def read_into(self, tensor: torch.Tensor, first: int) -> None:
        """Fill a contiguous tensor on the CPU with the bytes from place `first` on. What is read must lie behind what was read before."""
        self._skip_to(first)
        content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(content), CHUNK_BYTES):
            part = content[start : start + CHUNK_BYTES]
            if self._readinto(part) < len(part):
                raise EOFError(f"{self._file.name}: ends within a tensor")

    def finish(self) -> str | None:
        """Read the rest; returns the checksum of the whole file if it is to be checked."""
        if self._digest is None:
            return None
        while self._readinto(memoryview(bytearray(CHUNK_BYTES))):
            pass
        return self._digest.hexdigest()

    def _skip_to(self, place: int) -> None:
        if self._digest is None:
            self._place = self._file.seek(place)
            return
        if place < self._place:
            raise ValueError(f"{self._file.name}: has tensors that overlap")
        while self._place < place and self._readinto(memoryview(bytearray(min(CHUNK_BYTES, place - self._place)))):
            pass

    def _readinto(self, buffer: memoryview) -> int:
        """Fill `buffer`; returns the bytes read, which are fewer only at the end of the file."""
        count = 0
        while count < len(buffer) and (length := self._file.readinto(buffer[count:])):
            count += length
        self._place += count
        if self._digest is not None:
            self._digest.update(buffer[:count])
        return count
