"""Samples that were excluded come in no plan."""

from __future__ import annotations

import itertools
import json

import pytest

from fusiontrain.cli.main import main
from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import write_shards


def loader_of(source):
    config = tiny_config({"data.sources": [{"path": source}]})
    return Loader(config, load_tokenizer(config), "train", 0, 1)


def keys_of(loader, steps=30):
    return {ref.key for batches, _ in itertools.islice(loader.iterate(0), steps) for batch in batches for ref in batch.sources}


def exclusions(tmp_path, *entries):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text("".join(json.dumps({"shard": str(shard), "key": key, "reason": "x"}) + "\n" for shard, key in entries))
    return str(path)


def test_an_excluded_sample_is_planned_no_more_and_the_data_are_other_data(tmp_path):
    source = write_shards(tmp_path / "shards", shards=2, samples=12)
    before = loader_of(source)
    assert len(keys_of(before)) == 24
    file = exclusions(tmp_path, (f"{source}/shard-000.tar", "s0-0003"), (f"{source}/shard-001.tar", "s1-0000"))
    assert main(["data", "index", source, "--exclude", file]) == 0
    after = loader_of(source)
    assert keys_of(before) - keys_of(after) == {"s0-0003", "s1-0000"}
    assert sorted(after.sources[0].ref(sample).key for sample in range(22)) == sorted(keys_of(after))
    assert after.fingerprint != before.fingerprint


def test_excluding_adds_and_does_so_once(tmp_path, capsys):
    source = write_shards(tmp_path / "shards", shards=2, samples=4)
    for expected, key in ((1, "s0-0001"), (2, "s0-0002"), (2, "s0-0002")):
        assert main(["data", "index", source, "--json", "--exclude", exclusions(tmp_path, (f"{source}/shard-000.tar", key))]) == 0
        assert json.loads(capsys.readouterr().out)["excluded samples"] == expected
    assert len(loader_of(source).sources[0]) == 6


def test_excluding_from_one_shard_leaves_what_was_excluded_from_another(tmp_path):
    source = write_shards(tmp_path / "shards", shards=2, samples=4)
    for number in range(2):
        shard = f"{source}/shard-00{number}.tar"
        assert main(["data", "index", shard, "--exclude", exclusions(tmp_path, (shard, f"s{number}-0002"))]) == 0
    assert {f"s{shard}-{n:04d}" for shard in range(2) for n in range(4)} - keys_of(loader_of(source)) == {"s0-0002", "s1-0002"}


def test_a_key_that_no_sample_has_is_refused(tmp_path, capsys):
    source = write_shards(tmp_path / "shards", shards=1, samples=4)
    assert main(["data", "index", source, "--exclude", exclusions(tmp_path, (f"{source}/shard-000.tar", "nosuch"))]) == 2
    assert "shard-000.tar: no sample of it has the key 'nosuch'" in capsys.readouterr().err
    assert len(loader_of(source).sources[0]) == 4


def test_a_relative_shard_is_meant_from_the_current_folder(tmp_path, monkeypatch):
    """As in the bad_samples.jsonl of a run whose sources have relative paths."""
    source = write_shards(tmp_path / "shards", shards=1, samples=4)
    file = exclusions(tmp_path, ("shards/shard-000.tar", "s0-0001"))
    assert main(["data", "index", source, "--exclude", file]) == 2, "from another folder it is another shard"
    monkeypatch.chdir(tmp_path)
    assert main(["data", "index", source, "--exclude", file]) == 0
    assert len(loader_of(source).sources[0]) == 3


@pytest.mark.parametrize(("content", "said"), [("[1]\n", "line 1 is not"), ("\n{}\n", "line 2 is not"), ('{"shard": "/other.tar", "key": "k"}', "name it too")])
def test_a_list_that_cannot_be_meant_is_refused(tmp_path, capsys, content, said):
    source = write_shards(tmp_path / "shards", shards=1, samples=2)
    (tmp_path / "list").write_text(content)
    assert main(["data", "index", source, "--exclude", str(tmp_path / "list")]) == 2
    assert said in capsys.readouterr().err
