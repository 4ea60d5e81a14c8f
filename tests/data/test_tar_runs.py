"""Runs of plain members against Python's `tarfile`, and what must end a run."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from fusiontrain.data.storage.files import LocalFile, ReadAhead
from fusiontrain.data.tar import samples_in
from fusiontrain.data.tar_runs import BLOCK, plain_members

FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def tar_of(members: dict[str, bytes], form: int, mtime: float = 12.0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def listed(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar.getmembers()]


def run_of(data: bytes, offset: int = 0, size: int | None = None) -> tuple[list[tuple[str, int, int]], int]:
    members, length = plain_members(memoryview(data), offset, len(data) if size is None else size)
    return [tuple(member[:3]) for member in members], length


def some_members(count: int = 12) -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    return {f"{n:03d}.{'jpg' if n % 2 else 'json'}": draw.bytes(int(draw.choice([0, 1, 511, 512, 513, 5000]))) for n in range(count)}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("mtime", [12.0, 12.25, 1e9 + 0.123456])
def test_a_run_is_what_tarfile_lists(form, mtime):
    data = tar_of(some_members(), form, mtime)
    members, length = run_of(data)
    assert members == listed(data)
    assert length == members[-1][1] + -(-members[-1][2] // BLOCK) * BLOCK


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_of_a_part_of_a_tar_a_run_is_the_members_whose_headers_it_has(form):
    data = tar_of(some_members(), form, 12.25)
    everything = listed(data)
    for end in range(0, len(data), 100):
        members, _ = run_of(data[:end], size=len(data))
        assert members == [member for member in everything if member[1] <= end]


def test_a_run_may_begin_at_any_member():
    data = tar_of(some_members(), tarfile.USTAR_FORMAT)
    everything = listed(data)
    for number, (_, start, _) in enumerate(everything):
        assert run_of(data[start - BLOCK :], start - BLOCK, len(data))[0] == everything[number:]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_a_changed_byte_of_a_header_ends_the_run_before_it(form):
    data = tar_of(some_members(3), form, 12.25)
    everything = listed(data)
    begins = [0, *(start + -(-size // BLOCK) * BLOCK for _, start, size in everything[:-1])]
    for header in (everything[1][1] - BLOCK, begins[1]):  # the member's own, and that of its pax records if it has any
        for place in range(header, header + BLOCK):
            damaged = bytearray(data)
            damaged[place] ^= 1
            assert run_of(bytes(damaged)) == (everything[:1], begins[1]), place - header


ODD = {
    "a long name": {"x" * 120 + ".jpg": b"1"},
    "a name beyond ASCII": {"\u00e4.jpg": b"1"},
    "nothing": {},
}


@pytest.mark.parametrize("members", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_what_is_odd_is_left_to_the_reader_of_single_members(members, form):
    assert run_of(tar_of(members, form)) == ([], 0)


def test_a_member_that_goes_beyond_the_end_is_left_too():
    data = tar_of({"a.txt": b"1" * 600}, tarfile.USTAR_FORMAT)
    assert len(run_of(data, size=3 * BLOCK)[0]) == 1
    assert run_of(data, size=3 * BLOCK - 1) == ([], 0)


def grouped(names: list[str]) -> list[tuple[str, list[str]]]:
    """Keys and suffixes by the rule's own words: the key is the name up to the first dot of its last part."""
    found: list[tuple[str, list[str]]] = []
    for name in names:
        folder, _, base = name.removeprefix("./").rpartition("/")
        if "." not in base or base.startswith("."):
            continue
        key, suffix = f"{folder}/{base[: base.index('.')]}".lstrip("/" if not folder else ""), base[base.index(".") + 1 :].lower()
        if not found or found[-1][0] != key:
            found.append((key, []))
        found[-1][1].append(suffix)
    return found


def test_samples_are_grouped_by_the_first_dot_of_the_last_part(tmp_path):
    names = ["a.jpg", "a.TXT", "a.b/c.jpg", "a.b/c.x.json", "./d.jpg", "d.txt", "noext", "e/.hidden", "e/f.1.jpg", "e/f.2.jpg", "e/f2.jpg", "g.jpg"]
    path = tmp_path / "s.tar"
    path.write_bytes(tar_of(dict.fromkeys(names, b"1"), tarfile.USTAR_FORMAT))
    assert [(sample.key, list(sample.members)) for sample in samples_in(ReadAhead(LocalFile(path)), path)] == grouped(names)
