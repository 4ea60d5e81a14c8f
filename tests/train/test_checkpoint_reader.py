"""Tensors are read into their place whatever their layout is, there and here, and the checksum is that of the whole file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash

from fusiontrain.train.checkpoint import durable, reader
from fusiontrain.train.checkpoint.reader import CheckingReader
from fusiontrain.train.checkpoint.writer import CopyingPlanner, SealingWriter

STORED = {
    "rows": torch.randn(300, 7),
    "columns": torch.randn(5, 8).t(),
    "slice": torch.randn(9, 9)[2:5, 1::2],
    "half": torch.randn(33).bfloat16(),
    "number": torch.tensor(3),
    "none": torch.empty(0, 4),
}


def save(folder: Path) -> Path:
    dcp.save(STORED, storage_writer=SealingWriter(folder, 0, lambda: None), planner=CopyingPlanner(), no_dist=True)
    return folder / "__0_0.distcp"


@pytest.mark.parametrize("chunk", [64, 1000, durable.CHUNK_BYTES])
@pytest.mark.parametrize("names", [STORED.keys(), ["half"]])
def test_every_layout(tmp_path: Path, names: list[str], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the same layout, the transposed one and another dtype, with files read in chunks that end anywhere; all of a file or one tensor of it."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    file = save(tmp_path)
    content = file.read_bytes()
    layouts = {
        "the same": lambda stored: torch.full_like(stored, 9),
        "transposed": lambda stored: torch.full_like(stored.t().contiguous(), 9).t(),
        "wider": lambda stored: torch.full_like(stored, 9, dtype=torch.float64),
    }
    for layout, empty_like in layouts.items():
        for check, found in (({file.name: None}, {file.name: xxhash.xxh3_128(content).hexdigest()}), ({}, {})):
            targets = {name: empty_like(STORED[name]) for name in names}
            reading = CheckingReader(tmp_path, check)
            dcp.load(targets, storage_reader=reading, no_dist=True)
            for name, target in targets.items():
                assert torch.equal(target, STORED[name].to(target.dtype)), (layout, name)
            assert reading.checksums == found


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    file = save(tmp_path)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises((RuntimeError, EOFError, ValueError, dcp.CheckpointException)):
        dcp.load({name: torch.empty_like(tensor) for name, tensor in STORED.items()}, storage_reader=CheckingReader(tmp_path, ()), no_dist=True)
