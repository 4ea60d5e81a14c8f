"""Pieces of flattened tensors as boxes of whole ones, against counting elements one by one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from fusiontrain.parallel.flat_shard import FlatShard, boxes


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_hold_the_elements_in_their_order(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    found = []
    cut = list(boxes(tuple(shape), start, stop))
    for offsets, sizes in cut:
        part = whole
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(dim, offset, size)
        found += part.flatten().tolist()
    assert found == list(range(start, stop))
    assert len(cut) <= 2 * len(shape) + 1


def test_pieces_of_two_ranks_are_read_by_other_ranks(tmp_path: Path) -> None:
    """Written whole by one process, read by pieces that cut rows, share storage, or are empty."""
    whole = torch.randn(5, 3, 2)
    dcp.save({"w": FlatShard(whole.shape, 0, whole.flatten())}, checkpoint_id=tmp_path, no_dist=True)
    plain = torch.zeros_like(whole)
    dcp.load({"w": plain}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(plain, whole)
    line = torch.full((100,), 7.0)
    dcp.load({"w": FlatShard(whole.shape, 4, line.narrow(0, 10, 19))}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(line[10:29], whole.flatten()[4:23]) and (line[:10] == 7).all() and (line[29:] == 7).all()
    dcp.load({"w": FlatShard(whole.shape, 30, line[:0])}, checkpoint_id=tmp_path, no_dist=True)


def test_a_piece_is_not_mistaken_for_the_whole() -> None:
    shard = FlatShard(torch.Size([4, 4]), 3, torch.ones(5))
    assert shard.shape == (4, 4) and len(shard.to_local()) == 5
    with pytest.raises(TypeError, match="only a piece"):
        torch.add(shard, 1)
    with pytest.raises(TypeError, match="only a piece"):
        shard.isfinite()
