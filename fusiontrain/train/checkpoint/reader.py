"""How a rank reads tensors: from the disk straight into their place, and checking the file in the same pass."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.utils import _create_file_view  # with which torch reads these files
from torch.futures import Future

from fusiontrain.train.checkpoint.durable import CHUNK_BYTES


class CheckingReader(dcp.FileSystemReader):
    """Reads what torch's reader reads, without its three copies of every tensor on the way.

    check: names of files to be read whole if any tensor of theirs is wanted. After the load, `checksums` has those that were.
    """

    def __init__(self, checkpoint: Path, check: Collection[str]) -> None:
        super().__init__(checkpoint)
        self.checksums: dict[str, str] = {}
        self._folder, self._check = checkpoint, check

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future:
        """What DCP calls on every rank. Raises whatever damaged bytes may make of torch's unpacking."""
        wanted: dict[str, dict[Any, list[ReadItem]]] = {}
        for item in sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].offset):
            place = self.storage_data[item.storage_index]
            wanted.setdefault(place.relative_path, {}).setdefault(item.storage_index, []).append(item)
        for name, items in wanted.items():
            places = [self.storage_data[index] for index in items]
            with _Pass(self._folder / name, checked=name in self._check) as file, ThreadPoolExecutor(1) as ahead:
                for (first, stored), of_one in zip(ahead.map(file.layout, places), items.values(), strict=True):
                    _read(file, first, stored, of_one, planner)
                if (checksum := file.finish()) is not None:
                    self.checksums[name] = checksum
        done: Future = Future()
        done.set_result(None)
        return done


def _read(file: _Pass, first: int, stored: torch.Tensor, wanted: list[ReadItem], planner: LoadPlanner) -> None:
    """Read the tensor whose bytes begin at `first`, and give each of the items that ask for it, or for a part of it, what it asks for."""
    targets = [planner.resolve_tensor(item).detach() for item in wanted]
    if len(targets) == 1 and _same_memory(targets[0], stored):
        file.read_into(targets[0], first)
    else:
        whole = torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype)
        file.read_into(torch.empty(0, dtype=stored.dtype).set_(whole.untyped_storage()), first)
        for item, target in zip(wanted, targets, strict=True):
            part = whole[tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))]
            if part.shape != target.shape:
                raise ValueError(f"{item.storage_index}: has the shape {tuple(part.shape)} there and {tuple(target.shape)} here")
            target.copy_(part)
    for item, target in zip(wanted, targets, strict=True):
        planner.commit_tensor(item, target)


def _same_memory(target: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether the bytes of `stored` are those that `target` is to have, in the same order."""
    alike = (target.dtype, target.shape, target.stride()) == (stored.dtype, stored.shape, stored.stride())
    return alike and target.device.type == "cpu" and target.is_contiguous()


class _Pass:
    """One reading of a file, from its beginning to its end if it is to be checked, else only of what is asked for."""

    def __init__(self, path: Path, checked: bool) -> None:
        self._packed = path.open("rb")
        self._file = path.open("rb", buffering=0)
        self._place = 0
        self._digest = xxhash.xxh3_128() if checked else None
        self._thread = ThreadPoolExecutor(1)  # so that the next part is read while this one is digested
        self._last = self._thread.submit(lambda: None)

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
        self._file.close()
        self._packed.close()

    def layout(self, place: Any) -> tuple[int, torch.Tensor]:
        """Where the bytes of a stored tensor begin, and the tensor without them, on the meta device. To be called from one thread only."""
        stored = torch.load(_create_file_view(self._packed, place.offset, place.length), map_location="meta", weights_only=True)
        return place.offset + stored.untyped_storage()._checkpoint_offset, stored

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
        self._last.result()
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
            self._last.result()  # no more than two parts wait, whatever keeps the thread
            self._last = self._thread.submit(self._digest.update, buffer[:count])
        return count
