"""Damage, beside what Python's tarfile makes of it, and checksums of members."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from contextlib import closing

import numpy as np
import pytest

from fusiontrain.cli.main import main
from fusiontrain.data.errors import BadSample
from fusiontrain.data.index.array_file import is_as_written
from fusiontrain.data.index.build import build_index
from fusiontrain.data.index.shard_index import member_reader
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.tar import BLOCK
from fusiontrain.testing.shards import index_of, mixed_samples, read_members, write_shard
from fusiontrain.utils.errors import UserError

# What is done at the header of the third member, and whether tarfile says so (None: that depends on how it is read).
DAMAGE = {
    "cut inside a member": (lambda data, at: data[: at + BLOCK + 3], None),
    "cut at a member boundary": (lambda data, at: data[:at], False),
    "a flipped byte in a header": (lambda data, at: data[: at + 10] + bytes([data[at + 10] ^ 1]) + data[at + 11 :], False),
    "a zeroed block": (lambda data, at: data[:at] + bytes(BLOCK) + data[at + BLOCK :], False),
}


@pytest.mark.parametrize(("damage", "tarfile_notices"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_that_tarfile_passes_over_is_named_with_its_offset(tmp_path, damage, tarfile_notices):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:  # without a pax header before each member
        for number, sample in enumerate(mixed_samples(8)):
            for suffix, data in sample.items():
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    members = read_members(path)
    at = members[2].offset - BLOCK
    path.write_bytes(damage(path.read_bytes(), at))
    if tarfile_notices is False:
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 2 < len(members), "tarfile lost the rest without a word"
    with pytest.raises(UserError, match=rf"x\.tar: damaged at offset ({at}|{at + BLOCK}): "):
        build_index(path, "auto", "pixels")


def test_checksums_of_the_index_are_those_of_the_bytes(tmp_path):
    samples = mixed_samples(6)
    index = build_index(write_shard(tmp_path / "x.tar", samples), "auto", "pixels")
    for row, members in enumerate(samples):
        assert {suffix: member.crc for suffix, member in index.members(row).items()} == {s: zlib.crc32(data) for s, data in members.items()}


def test_a_flipped_bit_in_a_member_is_a_bad_sample(tmp_path):
    path = write_shard(tmp_path / "x.tar", mixed_samples(2))
    index = build_index(path, "auto", "pixels")
    members = index.members(0)
    data = bytearray(path.read_bytes())
    data[members["1.png"].offset + members["1.png"].size - 20] ^= 1
    path.write_bytes(data)
    with closing(open_shard(path)) as file:
        read = member_reader(members, file)
        assert read("json") == mixed_samples(1)[0]["json"]
        with pytest.raises(BadSample, match=rf"its \.1\.png at offset {members['1.png'].offset} does not match"):
            read("1.png")


def test_verify_names_every_member_that_changed(tmp_path, capsys):
    import os

    path = write_shard(tmp_path / "x.tar", mixed_samples(8))
    stat, index = path.stat(), index_of(path)
    changed = [index.members(1)["0.png"], index.members(4)["json"]]
    assert main(["data", "verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"samples": 8, "problems": 0}
    data = bytearray(path.read_bytes())
    for member in changed:
        data[member.offset + member.size // 2] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # rot on a disk leaves the time as it was
    assert main(["data", "verify", str(path)]) == 2
    said = capsys.readouterr().err
    for row, member in zip((1, 4), changed, strict=True):
        assert f"x.tar: sample {row} (sample-{row:04d}), member .{member.name} at offset {member.offset}: its bytes have CRC32" in said
    assert said.count("its bytes have CRC32") == 2


@pytest.mark.parametrize("workers", ["1", "2"])
def test_index_is_made_shard_by_shard_and_only_for_those_that_changed(tmp_path, capsys, workers):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", mixed_samples(4))
    command = ["data", "index", str(tmp_path), "--tokenizer", "bytes", "--workers", workers, "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    texts = [text for m in mixed_samples(4) for text in json.loads(m["json"])["texts"] if text]
    assert report["shards"] == 3 and report["samples"] == 12
    assert report["text tokens"] == report["text bytes"] == 3 * sum(map(len, texts))

    def written():
        files = (file for file in (tmp_path / ".fusiontrain-index").iterdir() if not file.name.startswith("manifest"))
        return {file.name: file.stat().st_mtime_ns for file in files}

    before = written()
    write_shard(tmp_path / "1.tar", mixed_samples(5))
    assert main(command) == 0
    after = written()
    assert before.items() <= after.items()
    assert {name[:2] for name in after.keys() - before.keys()} == {"1."}


def test_index_of_a_damaged_shard_ends_with_a_sentence(tmp_path, capsys):
    path = write_shard(tmp_path / "0.tar", mixed_samples(4))
    write_shard(tmp_path / "1.tar", mixed_samples(4))
    path.write_bytes(path.read_bytes()[:5000])
    assert main(["data", "index", str(tmp_path), "--workers", "2"]) == 2
    assert "0.tar: damaged at offset" in capsys.readouterr().err


def test_shards_without_a_sample_are_said(tmp_path, capsys):
    """A download that failed may leave a file of zeros, which is an empty tar."""
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    assert main(["data", "index", str(tmp_path)]) == 2
    assert f"{tmp_path}: not one sample in 1 shards" in capsys.readouterr().err
    write_shard(tmp_path / "1.tar", mixed_samples(4))
    assert main(["data", "index", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["samples"] == 4 and "1 of 2 shards hold no sample, the first of them is 0.tar" in err


def test_offsets_beyond_four_gib(tmp_path):
    """A sparse tar: one huge hole as a member, then a sample behind it."""
    path, hole = tmp_path / "x.tar", 5 << 30
    body = b"far away"
    with path.open("wb") as file:
        info = tarfile.TarInfo("hole.bin")
        info.size = hole
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(BLOCK + hole)
        info = tarfile.TarInfo("a.txt")
        info.size = len(body)
        file.write(info.tobuf() + body.ljust(BLOCK, b"\0") + bytes(2 * BLOCK))
    _, far = read_members(path)
    assert (far.offset, far.size) == (hole + 2 * BLOCK, len(body))
    with closing(open_shard(path)) as file:
        assert member_reader({"txt": far}, file)("txt") == body
    assert build_index(write_shard(tmp_path / "y.tar", mixed_samples(1)), "auto", "pixels").offsets.dtype == np.int64


def test_keys_with_dots_folders_and_meta_members(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("__meta__", "./v1.2/a.b.TXT", "./v1.2/a.txt", f"{'long' * 40}/c.txt", "./.hidden.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
    index = build_index(path, "captions", "pixels")
    assert [index.key(row) for row in range(len(index))] == ["v1.2/a", f"{'long' * 40}/c"]
    assert set(index.members(0)) == {"b.txt", "txt"}


@pytest.mark.parametrize("what", ["index", "tokens"])
def test_a_flipped_byte_of_an_index_is_found_wherever_it_lies(tmp_path, capsys, what):
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "x.tar", mixed_samples(3))
    assert main(["data", "index", str(shards), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob(f"*/*.{what}")
    whole = path.read_bytes()
    assert is_as_written(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert not is_as_written(path), at
    capsys.readouterr()
    assert main(["data", "verify", str(shards), "--out", str(tmp_path / "out")]) == 2
    assert re.search(rf"{path}: is damaged, or of another version: delete it", capsys.readouterr().err)
    path.unlink()
    assert main(["data", "verify", str(shards), "--out", str(tmp_path / "out")]) == 0
