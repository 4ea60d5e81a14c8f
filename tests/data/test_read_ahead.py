"""Reading ahead against the bytes of the file."""

from __future__ import annotations

import os

import numpy as np
import pytest

from fusiontrain.data.storage.files import LocalFile, ReadAhead


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr("fusiontrain.data.storage.files.READ_AHEAD_BLOCK", {False: 100, True: 100})
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(1234))
    return path


def test_any_reads_in_any_order_are_the_bytes_of_the_file(path):
    data, file, draw = path.read_bytes(), ReadAhead(LocalFile(path)), np.random.default_rng(1)
    for _ in range(5000):
        offset, end = np.sort(draw.integers(0, len(data) + 1, 2)).tolist()
        size = min(end - offset, int(draw.choice([10, 90, 320, 2000])))
        assert file.read(offset, size) == data[offset : offset + size]
    file.close()


def test_bytes_stay_as_they_were_when_the_walk_goes_on(path):
    data, file = path.read_bytes(), ReadAhead(LocalFile(path))
    parts = [file.read(offset, 61) for offset in range(0, 1200, 61)]
    assert b"".join(parts) == data[: len(parts) * 61]
    file.close()


def test_a_failed_read_leaves_nothing_wrong_behind(path):
    """The memory of a block that goes is used again; where its successor cannot be read whole, it holds neither."""
    data, file = path.read_bytes(), ReadAhead(LocalFile(path))
    for offset in (0, 100, 200, 300, 0):
        file.read(offset, 50)
    os.truncate(path, 450)
    with pytest.raises(OSError, match="50 bytes instead of 100 at offset 400"):
        file.read(400, 20)
    assert [file.read(offset, 50) for offset in (0, 100, 200, 300)] == [data[offset : offset + 50] for offset in (0, 100, 200, 300)]
    file.close()
