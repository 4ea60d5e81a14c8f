"""The manifest of a folder: a start opens it and no other file, and what was added, removed or changed is seen all the same."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import pickle
import shutil
import sys

import numpy as np
import pytest

from fusiontrain.cli.main import main
from fusiontrain.data.index.cache import Reading, index_sources, measure_shards
from fusiontrain.data.index.exclude import NAME
from fusiontrain.data.index.files import MOST_OPEN
from fusiontrain.data.index.folder import FOLDER
from fusiontrain.data.loader import Loader
from fusiontrain.data.plan.fields import plan_fields
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import interleaved, mixed_samples, write_shard, write_shards
from fusiontrain.utils.errors import UserError

TOKENIZER = load_tokenizer(tiny_config())
OPENED: list[str] = []


def note_opened(event, arguments):
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append(os.fspath(arguments[0]))


sys.addaudithook(note_opened)  # cannot be taken back; it only notes


def open_source(path, index_dir=None):
    config = tiny_config({"data.sources": [{"path": str(path)}], "data.index_dir": index_dir and str(index_dir)})
    (source,) = index_sources(config.data.sources, config.data, TOKENIZER)
    return source, plan_fields(config, [source], TOKENIZER)


def content(source):
    """Everything that a plan and a loader ask of a source."""
    rows = []
    for sample in range(len(source)):
        shard, row = source.locate(sample)
        index, tokens = source.indexes[shard], source.tokens[shard]
        pieces = index.pieces(row)
        sizes = [array[pieces].tolist() for array in (index.kinds, index.heights, index.widths, tokens.counts)]
        rows.append((source.ref(sample).key, source.shards[shard].name, sizes, index.members(row)))
    return rows


def measured(path, index_dir=None):
    """How many shards a start had to measure."""
    seen = [0]
    measure_shards(expand_shards(str(path)), Reading("auto", "pixels", index_dir), TOKENIZER, progress=lambda done, total: seen.append(total))
    return seen[-1]


def test_a_start_opens_the_manifests_and_nothing_else(tmp_path):
    source = write_shards(tmp_path, shards=30, samples=2)
    before, _ = open_source(source)
    OPENED.clear()
    again, _ = open_source(source)
    manifests = [name for name in OPENED if str(tmp_path) in name]
    assert sorted(os.path.basename(name).rsplit(".", 2)[1] for name in manifests) == ["index", "tokens"]
    assert len(again) == 60
    OPENED.clear()
    again.ref(2 * 17)
    assert [os.path.basename(name).split(".")[0] for name in OPENED] == ["shard-017"]
    assert content(again) == content(before)


def test_what_was_added_removed_or_changed_is_measured_and_nothing_else(tmp_path):
    source = write_shards(tmp_path / "shards", shards=5, samples=4)
    assert measured(source) == 5
    assert measured(source) == 0
    write_shard(tmp_path / "shards" / "shard-002.tar", mixed_samples(9, 700), prefix="other")
    write_shard(tmp_path / "shards" / "shard-009.tar", mixed_samples(3, 800), prefix="new")
    (tmp_path / "shards" / "shard-000.tar").unlink()
    assert measured(source) == 2
    found, fields = open_source(source)
    fresh, fresh_fields = open_source(source, tmp_path / "elsewhere")
    assert content(found) == content(fresh)
    assert fields == fresh_fields
    assert len(found) == 3 * 4 + 9 + 3


def test_files_that_no_manifest_knows_are_found_and_the_manifest_is_mended(tmp_path):
    source = write_shards(tmp_path, shards=3, samples=4)
    expected, fields = open_source(source)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).glob("shard-*")}
    for manifest in (tmp_path / FOLDER).glob("manifest*"):
        manifest.write_bytes(manifest.read_bytes()[:50])
    assert measured(source) == 3
    assert measured(source) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files, "none was built anew"
    (tmp_path / FOLDER).joinpath(next(iter(files)).name).unlink()
    assert measured(source) == 1
    again, fields_again = open_source(source)
    assert (content(again), fields_again) == (content(expected), fields)


def test_shards_in_a_read_only_place_have_their_index_elsewhere(tmp_path, capsys):
    source, out = write_shards(tmp_path / "shards", shards=2, samples=12), tmp_path / "mirror"
    command = ["data", "index", source, "--tokenizer", "bytes", "--out", str(out), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 24
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"shard": f"{source}/shard-001.tar", "key": "s1-0005"}))
    assert main([*command, "--exclude", str(bad)]) == 0
    assert measured(source, out) == 0
    assert sorted(os.listdir(tmp_path / "shards")) == ["shard-000.tar", "shard-001.tar"]
    assert list(out.glob(f"shards-*/{NAME}"))
    loader = Loader(tiny_config({"data.sources": [{"path": source}], "data.index_dir": str(out)}), TOKENIZER, "train", 0, 1)
    keys = {ref.key for batches, _ in itertools.islice(loader.iterate(0), 40) for batch in batches for ref in batch.sources}
    assert len(keys) == 23
    assert "s1-0005" not in keys
    assert sorted(os.listdir(tmp_path / "shards")) == ["shard-000.tar", "shard-001.tar"]


def test_an_index_that_can_be_kept_nowhere_is_refused(tmp_path):
    source = write_shards(tmp_path / "shards", shards=1, samples=2)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"shard-000\.tar: its index can be kept in none of .*file.*data\.index_dir"):
        open_source(source, tmp_path / "file")


def test_a_manifest_that_cannot_be_written_is_done_without(tmp_path, caplog):
    """As on a disk that is full once the indexes are there."""
    source = write_shards(tmp_path / "shards", shards=2, samples=3)
    open_source(source)
    _, fields = open_source(source)
    for path in (tmp_path / "shards" / FOLDER).glob("manifest*"):
        path.unlink()
        (path / "in the way").mkdir(parents=True)
    assert open_source(source)[1] == fields
    assert "every start will open the files of all its shards" in caplog.text


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path):
    source = write_shards(tmp_path, shards=4, samples=3)
    damaged = tmp_path / "shard-002.tar"
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:700])
    with pytest.raises(UserError, match=r"shard-002\.tar: damaged at offset"):
        open_source(source)
    damaged.write_bytes(sound)
    assert measured(source) == 2


def test_the_same_samples_in_another_folder_are_the_same_data(tmp_path):
    source = write_shards(tmp_path / "a", shards=2, samples=4)
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(FOLDER))
    _, fields = open_source(source)
    assert open_source(tmp_path / "b")[1] == fields
    samples = mixed_samples(4, 4)
    samples[2] = interleaved(["number 6 is told hare"], [None])  # as long as it was
    write_shard(tmp_path / "b" / "shard-001.tar", samples, prefix="s1")
    changed = open_source(tmp_path / "b")[1]
    assert {name for name in fields if fields[name] != changed[name]} == {"data.sources.0.samples"}


def test_arrays_are_mapped_and_no_more_files_than_allowed(tmp_path):
    count = MOST_OPEN // 2 + 20
    for number in range(count):
        write_shard(tmp_path / f"{number:03d}.tar", [{"txt": b"text"}])
    source, _ = open_source(tmp_path)
    for shard in range(count):
        crcs = source.indexes[shard].crcs
        assert isinstance(crcs.base.obj if isinstance(crcs.base, memoryview) else crcs.base, mmap.mmap)
        assert not crcs.flags.writeable
        assert source.tokens[shard].start.tolist() == [0, 4]
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{name}")]
    assert 0 < sum(str(tmp_path) in link for link in links) <= MOST_OPEN < 2 * count


def test_a_source_can_be_sent_to_another_process_without_its_arrays(tmp_path):
    source, _ = open_source(write_shards(tmp_path, shards=2, samples=400))
    sent = pickle.dumps(source)
    assert len(sent) < 5000 < sum(array.nbytes for array in vars(source.indexes[0]).values() if isinstance(array, np.ndarray))
    assert content(pickle.loads(sent)) == content(source)


def test_an_index_file_that_was_damaged_since_is_named(tmp_path):
    source, _ = open_source(write_shards(tmp_path, shards=2, samples=2))
    (file,) = (tmp_path / FOLDER).glob("shard-001.*.index")
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(UserError, match=r"shard-001\..*\.index: this part of the index is damaged.*data index"):
        source.ref(3)
