"""Folders of safetensors, written and read tensor by tensor, so that nobody ever holds the model.

A file is 8 bytes that count its header (little endian), the header (JSON: dtype, shape and place of every tensor), and the tensors' bytes. All of
the header is known before the first value is, so the values can pass through one at a time. The library of that name writes only what it holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fusiontrain.utils.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5 * 10**9
BLOCK = 2**20
"""Numbers that are converted and written at once."""

Read = Callable[[str], torch.Tensor]
"""Name of a tensor -> all of it, on the CPU, in any float dtype."""


@dataclass(frozen=True)
class Planned:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path, tensors: Sequence[Planned], read: Read, max_shard_bytes: int = MAX_SHARD_BYTES, done: Callable[[int], None] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Write `tensors` into `folder` in their order, as `model.safetensors` or as numbered shards and an index, and flush them to the disk.

    read: asked for every tensor once, just before it is written. max_shard_bytes: a file is larger only where one tensor is. done: called with
    the bytes of every tensor that is written. Returns size and sha256 of each file of tensors, by name.
    """
    shards = split(tensors, max_shard_bytes)
    names = [SINGLE_FILE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = {name: _write_file(folder / name, shard, read, done) for name, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.num_bytes for tensor in tensors)
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    return files


def split(tensors: Sequence[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """Neighbours together, as many as fit into `max_shard_bytes`; at least one tensor each."""
    shards: list[list[Planned]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: Sequence[Planned], read: Read, done: Callable[[int], None]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(block: bytes | memoryview) -> None:
            digest.update(block)
            file.write(block)

        write(_header(tensors))
        for tensor in tensors:
            _write_values(write, read(tensor.name), tensor)  # the values are let go before the next ones are read
            done(tensor.num_bytes)
        file.flush()
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _header(tensors: Sequence[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values are to begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _write_values(write: Callable[[memoryview], None], values: torch.Tensor, tensor: Planned) -> None:
    assert values.shape == tensor.shape, f"{tensor.name} has shape {tuple(values.shape)}, {tensor.shape} was announced"
    for block in values.detach().flatten().split(BLOCK):
        write(memoryview(block.to(tensor.dtype).view(torch.uint8).numpy()))


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet. start: its first byte there."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    def rows(self, first: int, last: int) -> torch.Tensor:
        """[last - first, ...] on the CPU, memory of its own. Raises UserError where the file cannot be read."""
        rows = torch.empty(max(last - first, 0), *self.shape[1:], dtype=self.dtype)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if not rows.numel():
            return rows
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start + first * row_bytes)
                _read_all(file, memoryview(rows.view(-1).view(torch.uint8).numpy()))
        except OSError as error:
            raise _unreadable(self.file, error) from error
        return rows


def _read_all(file: FileIO, target: memoryview) -> None:
    while target:
        count = file.readinto(target)
        if not count:
            raise OSError("it ends early")
        target = target[count:]


def open_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder of safetensors, by name. Raises UserError for files that are missing, damaged or at odds with their index."""
    tensors: dict[str, Stored] = {}
    for path in tensor_files(folder):
        for name, tensor in _tensors_of(path):
            if name in tensors:
                raise UserError(f"{path}: holds {name}, and so does {tensors[name].file.name}: one of them does not belong to the model")
            tensors[name] = tensor
    _require_index(folder, tensors)
    return tensors


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in a stable order: those that its index names, or the single one. Raises UserError if there are none."""
    if (folder / INDEX_FILE).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder).values()))]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    raise UserError(f"{folder}: no {SINGLE_FILE} or {INDEX_FILE} in it (weights must be safetensors)")


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / INDEX_FILE).read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX_FILE}: is not an index of safetensors: it is damaged, fetch it again") from error


def _tensors_of(path: Path) -> Iterator[tuple[str, Stored]]:
    if not path.is_file():
        raise UserError(f"{path}: is missing, and {INDEX_FILE} names it: fetch it again")
    for name, entry in _read_header(path).items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is of dtype {entry['dtype']}, which is not supported: give weights in {', '.join(DTYPES)}")
        yield name, Stored(path, tuple(entry["shape"]), DTYPES[entry["dtype"]], entry["start"])


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and start of every tensor. That they fit each other and the file is for the library to check."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    header.pop("__metadata__", None)
    return {name: {**entry, "start": 8 + length + entry["data_offsets"][0]} for name, entry in header.items()}


def _require_index(folder: Path, tensors: dict[str, Stored]) -> None:
    if not (folder / INDEX_FILE).is_file():
        return
    named = _weight_map(folder)
    for name in sorted(named.keys() ^ tensors.keys()):
        where = named[name] if name in named else tensors[name].file.name
        what = "does not hold it" if name in named else "holds it"
        raise UserError(f"{folder}: {INDEX_FILE} {'names' if name in named else 'does not name'} {name}, and {where} {what}: the folder is damaged")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read as safetensors: {error}: it is damaged, fetch it again")
