"""Shards: names, damage, formats, and the index against what is in them."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from fusiontrain.data.index.build import build_index
from fusiontrain.data.index.cache import index_sources
from fusiontrain.data.index.shard_index import IMAGE_PIECE, TEXT_PIECE
from fusiontrain.data.jsonl import shard_samples
from fusiontrain.data.shards import OpenShards, expand_shards
from fusiontrain.data.tar import BLOCK, members_in
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import index_of, interleaved, mixed_samples, png, read_members, write_shard, write_shards
from fusiontrain.utils.errors import UserError

TOKENIZER = load_tokenizer(tiny_config())


# ---------------------------------------------------------------- names


def test_a_path_may_be_a_tar_a_folder_a_glob_or_a_brace_range(tmp_path):
    write_shards(tmp_path, shards=12, samples=1)
    everything = [tmp_path / f"shard-{n:03d}.tar" for n in range(12)]
    assert expand_shards(str(tmp_path)) == everything
    assert expand_shards(f"{tmp_path}/shard-*.tar") == everything
    assert expand_shards(f"{tmp_path}/shard-{{000..011}}.tar") == everything
    assert expand_shards(f"{tmp_path}/shard-{{003,001}}.tar") == [everything[1], everything[3]]
    assert expand_shards(f"{tmp_path}/shard-{{000..002,010,008..009}}.tar") == [*everything[:3], *everything[8:11]]
    assert expand_shards(str(everything[5])) == [everything[5]]
    odd = write_shard(tmp_path / "odd" / "name[1].tar", mixed_samples(1))
    assert expand_shards(str(odd)) == [odd]


@pytest.mark.parametrize("path", ["nothing", "nothing-*.tar", "shard-{000..002}.tar"])
def test_a_path_without_shards_is_refused(tmp_path, path):
    write_shards(tmp_path, shards=1)
    with pytest.raises(UserError, match=r"no such shard|no file there that ends in \.tar"):
        expand_shards(f"{tmp_path}/{path}")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("shard-{000-015}.tar", r"shard-\{000-015\}\.tar: no such shard"),
        ("shard-{}.tar", r"shard-\{\}\.tar: no such shard"),
        ("shard-{000..000,7..8}.tar", r"shard-7\.tar \(of .*shard-\{000\.\.000,7\.\.8\}\.tar\): no such shard"),
        ("shard-{3..1}.tar", r"^\{3\.\.1\}: the range 3\.\.1 of a source's path runs downwards; write \{1\.\.3\}$"),
    ],
)
def test_braces_that_mean_nothing_are_shown_as_they_were_written(tmp_path, path, said):
    write_shards(tmp_path, shards=1)
    with pytest.raises(UserError, match=said):
        expand_shards(f"{tmp_path}/{path}")


def test_the_shard_read_longest_ago_is_closed_first(tmp_path):
    paths = [write_shard(tmp_path / f"{n}.tar", mixed_samples(1)) for n in range(3)]
    shards = OpenShards(limit=2)
    first = shards.file(paths[0])
    second = shards.file(paths[1])
    assert shards.file(paths[0]) is first
    shards.file(paths[2])
    assert shards.file(paths[0]) is first
    assert [list(mine) for mine in shards._open.values()] == [[paths[2], paths[0]]]
    assert first.read(0, 8) == paths[0].read_bytes()[:8]
    with pytest.raises(OSError):
        second.read(0, 8)
    shards.close()
    with pytest.raises(OSError):
        first.read(0, 8)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_what_tarfile_reads(tmp_path, format):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for n in range(5):
            file = tmp_path / f"f{n}"
            file.write_bytes(bytes([n]) * (500 * n + 1))
            long = "deep/" * 30 + "folder/" if format != tarfile.USTAR_FORMAT else "folder/"
            tar.add(file, f"{long}key{n}.bin")
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert [(m.name, m.offset, m.size) for m in read_members(path)] == expected


def _cut_inside(data, starts):
    return data[: starts[2] + BLOCK + 3]


def _cut_at_member(data, starts):
    return data[: starts[2]]


def _flip_header(data, starts):
    return data[: starts[2] + 10] + bytes([data[starts[2] + 10] ^ 1]) + data[starts[2] + 11 :]


def _zero_block(data, starts):
    return data[: starts[2]] + bytes(BLOCK) + data[starts[2] + BLOCK :]


def _one_end_block(data, starts):
    return data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % BLOCK) + bytes(BLOCK)


@pytest.mark.parametrize("damage", [_cut_inside, _cut_at_member, _flip_header, _zero_block, _one_end_block])
def test_every_damage_is_found_and_placed(tmp_path, damage):
    path = write_shard(tmp_path / "x.tar", mixed_samples(8))
    starts = [member.offset - BLOCK for member in read_members(path)]
    data = path.read_bytes()
    path.write_bytes(damage(data, starts))
    with pytest.raises(UserError, match=r"x\.tar: damaged at offset \d+: .+") as error:
        read_members(path)
    assert "\n" not in str(error.value)


def _pax_shard(tmp_path, name="a.txt"):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.pax_headers = 1, {"comment": "hello"}
        tar.addfile(info, io.BytesIO(b"x"))
    return path


@pytest.mark.parametrize("records", [b"0 path=b.txt\n", b"-5 path=b.txt\n", b"99 path=b.txt\n", b"nonsense", b"16 comment=hellox", b"18 comment=hello\n"])
def test_damage_in_a_pax_header_is_found(tmp_path, records):
    path = _pax_shard(tmp_path)
    data = bytearray(path.read_bytes())
    assert data[BLOCK : BLOCK + 17] == b"17 comment=hello\n"
    data[BLOCK : BLOCK + 17] = records[:17].ljust(17, b"x")
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged at offset 0: a pax header is unreadable"):
        read_members(path)


class Memory:
    """A shard's file that lies in memory."""

    far = False

    def __init__(self, data):
        self.data, self.size = bytes(data), len(data)

    def read(self, offset, size):
        return self.data[offset : offset + size]

    def close(self):
        pass


@pytest.mark.parametrize("name", ["a.txt", "\xff" * 120 + "/" + "\xff" * 60 + ".txt"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_changed_byte_of_every_header_is_found(tmp_path, format, name):
    """Also of the second of two pax headers that were alike, and of headers whose bytes add up to more than an Adler-32 can tell."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format, encoding="latin-1") as tar:
        for number in range(2):
            info = tarfile.TarInfo(f"{number}{name}")
            info.size, info.mtime = 1, 1.5 if format == tarfile.PAX_FORMAT else 1
            info.linkname = info.uname = info.gname = "\xff" * 31 if name != "a.txt" else ""
            tar.addfile(info, io.BytesIO(b"x"))
    data = path.read_bytes()
    headers = [place for place in range(0, len(data), BLOCK) if data[place + 257 : place + 262] == b"ustar"]
    assert len(read_members(path)) == 2 and len(headers) >= 2
    for header in headers:
        for place in range(header, header + BLOCK):
            damaged = bytearray(data)
            damaged[place] ^= 1 << place % 3  # bits in which no two digits of an octal number are equal
            with pytest.raises(UserError, match=f"damaged at offset {header}: "):
                list(members_in(Memory(damaged), path))


def test_a_size_below_zero_is_damage(tmp_path):
    path = write_shard(tmp_path / "x.tar", mixed_samples(2))
    data = bytearray(path.read_bytes())
    data[124:136] = b"-0000001000\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged at offset 0: a header is unreadable"):
        read_members(path)


def test_names_that_are_not_utf8_stay_apart(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name in ("\xe9.txt", "\xe8.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert [member.name for member in read_members(path)] == ["\\xe9.txt", "\\xe8.txt"]
    assert len(build_index(path, "auto", "pixels")) == 2


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("folder", ["", "long/" * 30])
def test_a_link_is_no_member_that_may_be_missing(tmp_path, kind, folder):
    """GNU tar writes a file that it has met before as a link: to pass over it would make a picture's sample one of text alone."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo(f"{folder}link.txt")
        link.type, link.linkname = kind, "target/" * 30
        tar.addfile(link)
    with pytest.raises(UserError, match=rf"member {folder}link\.txt is a link"):
        read_members(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["folder", "pipe", "broken link"])
def test_what_is_called_a_shard_and_is_no_file_is_named(tmp_path, make):
    write_shards(tmp_path, shards=1)
    make(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"x\.tar: not a regular file"):
        expand_shards(str(tmp_path))


def test_a_member_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "a.TXT"):
            (tmp_path / "f").write_text("x")
            tar.add(tmp_path / "f", name)
    with pytest.raises(UserError, match=r"sample 'a': member \.TXT comes twice, the second at offset \d+"):
        list(shard_samples(path))


def test_members_of_a_sample_must_be_neighbours(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "b.txt", "a.json"):
            (tmp_path / name).write_text("x")
            tar.add(tmp_path / name, name)
    with pytest.raises(UserError, match=r"sample 'a' .* not neighbours"):
        list(shard_samples(path))


def test_keys_end_at_the_first_dot_and_suffixes_are_lower_case(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        (tmp_path / "f").write_text("x")
        for name in ("./sub/a.b.TXT", "./sub/a.JSON"):
            tar.add(tmp_path / "f", name)
    (sample,) = shard_samples(path)
    assert sample.key == "sub/a"
    assert set(sample.members) == {"b.txt", "json"}


# ---------------------------------------------------------------- formats and index


def test_index_measures_texts_and_images(tmp_path):
    samples = [interleaved(["one", None, "two!"], [None, png(0, (12, 20)), None]), {"txt": b"abc", "jpg": png(1, (30, 10), format="JPEG")}]
    index = build_index(write_shard(tmp_path / "x.tar", samples), "auto", "pixels")
    assert index.kinds.tolist() == [TEXT_PIECE, IMAGE_PIECE, TEXT_PIECE, TEXT_PIECE, IMAGE_PIECE]
    assert index.text_bytes.tolist() == [3, 0, 4, 3, 0]
    assert index.heights.tolist() == [0, 20, 0, 0, 10]
    assert index.widths.tolist() == [0, 12, 0, 0, 30]
    assert index.is_pair.tolist() == [False, True]
    assert index.piece_start.tolist() == [0, 3, 5]


def test_members_in_the_index_are_the_bytes_that_were_written(tmp_path):
    samples = mixed_samples(6)
    path = write_shard(tmp_path / "x.tar", samples)
    index = build_index(path, "auto", "pixels")
    data = path.read_bytes()
    for row, members in enumerate(samples):
        found = {suffix: data[m.offset : m.offset + m.size] for suffix, m in index.members(row).items()}
        assert found == members
        assert {m.crc for m in index.members(row).values()} == {zlib.crc32(content) for content in members.values()}



BAD = {
    "no json": ({"bin": b"x"}, "has no text"),
    "broken json": ({"json": b"{"}, "not valid JSON"),
    "missing image": ({"json": json.dumps({"texts": [None], "images": ["9.png"]}).encode()}, r"has no member \.9\.png"),
    "both in one place": ({**interleaved(["x"], [png(0)])}, "both a text and an image"),
    "lists of two lengths": ({"json": b'{"texts": ["a"], "images": []}'}, "has 1 places"),
    "nothing in it": ({"json": b'{"texts": [null], "images": [null]}'}, "neither text nor image"),
    "a number as text": ({"json": b'{"texts": [7], "images": [null]}'}, "is a int"),
    "not an image": ({"txt": b"hello", "png": b"nonsense"}, "not an image"),
    "two images": ({"txt": b"hello", "png": png(0), "jpg": png(1)}, "a caption pair has one"),
    "half a surrogate pair": ({"json": b'{"texts": ["\\ud800"], "images": [null]}'}, "not Unicode"),
    "half a surrogate pair as caption": ({"json": b'{"caption": "\\ud800"}'}, "not Unicode"),
    "json without an end": ({"json": b"[" * 200_000}, "not valid JSON"),
    "json that is not UTF-8": ({"json": b'{"caption": "\xff"}'}, "not valid JSON"),
    "text that is not UTF-8": ({"txt": b"\xff\xfe"}, "not UTF-8"),
}


@pytest.mark.parametrize(("members", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_sample_is_named_and_the_others_stay(tmp_path, members, reason):
    import re

    good = mixed_samples(2)
    index = build_index(write_shard(tmp_path / "x.tar", [good[0], members, good[1]]), "auto", "pixels")
    assert index.numbers.tolist() == [0, 2]
    ((number, _, found),) = index.bad
    assert number == 1
    assert re.search(reason, found)


def test_index_is_cached_until_the_shard_changes(tmp_path):
    path = write_shard(tmp_path / "x.tar", mixed_samples(2))
    first = index_of(path)
    (cached,) = (tmp_path / ".fusiontrain-index").glob("*.index")
    before = cached.stat().st_mtime_ns
    again = index_of(path)
    assert all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    assert cached.stat().st_mtime_ns == before
    write_shard(path, mixed_samples(3))
    assert len(index_of(path)) == 3


def test_a_damaged_index_is_named_and_without_a_manifest_built_anew(tmp_path):
    path = write_shard(tmp_path / "x.tar", mixed_samples(3))
    index_of(path)
    (cached,) = (tmp_path / ".fusiontrain-index").glob("*.index")
    sound = cached.read_bytes()
    for damage in (b"", sound[:100], sound[:-30], b"x" * len(sound)):
        cached.write_bytes(damage)
        with pytest.raises(UserError, match=r"x\.\w+\.index: this part of the index is damaged"):
            len(index_of(path))
        for manifest in cached.parent.glob("manifest.*"):
            manifest.unlink()
        assert len(index_of(path)) == 3
        assert cached.read_bytes() == sound


def test_what_is_compressed_or_appended_is_said(tmp_path):
    path = write_shard(tmp_path / "x.tar", mixed_samples(3))
    sound = path.read_bytes()
    path.write_bytes(gzip.compress(sound))
    with pytest.raises(UserError, match=r"x\.tar: is compressed by gzip; name it \.tar\.gz"):
        read_members(path)
    for appended in (b"x", sound):
        path.write_bytes(sound + appended)
        with pytest.raises(UserError, match="something was appended"):
            read_members(path)


def test_where_the_shards_lie_read_only_the_index_goes_to_the_temporary_folder(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "shards" / "x.tar", mixed_samples(3))
    (tmp_path / "shards" / ".fusiontrain-index").write_text("in the way: works for root too")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len(index_of(path)) == 3
    (cached,) = tmp_path.glob("fusiontrain-index-*/*/*.index")
    before = cached.stat().st_mtime_ns
    assert len(index_of(path)) == 3
    assert cached.stat().st_mtime_ns == before


def test_a_source_without_a_usable_sample_is_refused(tmp_path):
    write_shard(tmp_path / "x.tar", [{"bin": b"x"}])
    config = tiny_config({"data.sources": [{"path": str(tmp_path)}]})
    with pytest.raises(UserError, match=r"without a usable sample; the first of 1 unusable samples is .*sample-0000"):
        index_sources(config.data.sources, config.data, TOKENIZER)
