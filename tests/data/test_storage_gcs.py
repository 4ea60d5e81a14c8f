"""Shards in Google Cloud Storage: gcsfs against a server that speaks the JSON API."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing

import fsspec
import numpy as np
import pytest

from fusiontrain.cli.main import main
from fusiontrain.config.schema import StorageConfig
from fusiontrain.data.index.build import build_index
from fusiontrain.data.loader import Loader
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.gcs_server import gcs_server
from fusiontrain.testing.shards import mixed_samples, write_shard, write_shards
from fusiontrain.utils.errors import UserError

SETTINGS = StorageConfig(retries=1, timeout_seconds=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """(server, local folder) of a bucket `data` with the shards of the folder under `train/`."""
    with gcs_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setenv("FSSPEC_GS_TOKEN", "anon")  # read when a process starts; this one has
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        folder = tmp_path_factory.mktemp("shards")
        write_shards(folder, shards=3, samples=8)
        for path in sorted(folder.glob("*.tar")):
            server.put("data", f"train/{path.name}", path.read_bytes())
        server.put("data", "train/README.md", b"no shard")
        server.put("data", "train/deeper/shard-009.tar", b"not in this folder")
        yield server, folder
        fsspec.filesystem("gs").clear_instance_cache()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fusiontrain.data.storage.retry.FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def sound(store):
    yield
    store[0].fault = lambda path: None


def hashes(source, steps):
    config = tiny_config({"data.sources": [{"path": source}], "data.pack_window_documents": 8, "data.storage.retries": 1})
    with contextlib.closing(Loader(config, load_tokenizer(config), "train", 0, 1).iterate(0)) as iterator:
        steps = itertools.islice(iterator, steps)
        return [(batch.token_ids.numpy().tobytes(), batch.payloads["image"].values.numpy().tobytes()) for (batch,), _ in steps]


@pytest.mark.parametrize("path", ["gs://data/train/", "gs://data/train", "gs://data/train/*.tar", "gs://data/train/shard-{000..002}.tar"])
def test_folders_globs_and_ranges_are_listed_with_size_and_generation(store, path):
    server, folder = store
    shards = expand_shards(path, SETTINGS)
    names = sorted(name.name for name in folder.glob("*.tar"))
    assert [str(shard) for shard in shards] == [f"gs://data/train/{name}" for name in names]
    for name, shard in zip(names, shards, strict=True):
        generation, data = server._objects["data"][f"train/{name}"]
        assert (shard.size, shard.tag) == (len(data), str(generation))


def test_bytes_and_indexes_are_those_of_the_files(store):
    _, folder = store
    for shard in expand_shards("gs://data/train/", SETTINGS):
        data, file = (folder / shard.name).read_bytes(), open_shard(shard)
        for first, end in np.sort(np.random.default_rng(1).integers(0, len(data), (5, 2)), axis=1).tolist():
            assert file.read(first, end - first) == data[first:end]
        built, expected = build_index(shard, "auto", "pixels"), build_index(folder / shard.name, "auto", "pixels")
        assert all(np.array_equal(a, b) for a, b in zip(vars(built).values(), vars(expected).values(), strict=True))


def test_two_epochs_are_those_of_local_files(store):
    assert hashes("gs://data/train/", 16) == hashes(str(store[1]), 16)


def test_the_commands_take_buckets(store, capsys):
    reports = []
    for path in ("gs://data/train/", str(store[1])):
        assert main(["data", "index", path, "--tokenizer", "bytes", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]
    assert main(["data", "verify", "gs://data/train/", "--json"]) == 0


def _read_in_process(shard):
    return open_shard(shard).read(512, 100)


def test_a_shard_can_be_sent_to_a_spawned_process(store):
    shard = expand_shards("gs://data/train/", SETTINGS)[0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_in_process, (shard,)) == (store[1] / shard.name).read_bytes()[512:612]


def test_what_is_missing_is_said_in_a_sentence(store):
    with pytest.raises(UserError, match=r"^gs://data/nothing\.tar: is not there$"):
        expand_shards("gs://data/nothing.tar", SETTINGS)
    with pytest.raises(UserError, match=r"^gs://data/empty/: is not there"):
        expand_shards("gs://data/empty/", SETTINGS)
    with pytest.raises(UserError, match=r"^gs://data/train/\*\.tgz: no \.tar file or \.jsonl there"):
        expand_shards("gs://data/train/*.tgz", SETTINGS)


def downloads(server):
    """Requests for bytes: a listing that gcsfs has asked for beside them may come at any time."""
    return [path for path in server.requests if path.startswith("/download/")]


@pytest.mark.parametrize("size", [2000, 600])
def test_an_object_that_is_replaced_during_a_run_ends_it(store, size):
    """By one of the same size too, whose bytes would pass for those that were indexed but for their CRC32."""
    server, _ = store
    server.put("data", "changing.tar", bytes(2000))
    (shard,) = expand_shards("gs://data/changing.tar", SETTINGS)
    assert open_shard(shard).read(500, 100) == bytes(100)
    server.put("data", "changing.tar", b"x" * size)
    server.requests.clear()
    with pytest.raises(UserError, match=r"^gs://data/changing\.tar: 100 bytes at offset 500: is gone, or the shard has changed since the run began"):
        open_shard(shard).read(500, 100)
    assert len(downloads(server)) == 1, "no further try mends that"


def test_an_overwritten_object_is_another_shard_to_the_next_run(store, tmp_path):
    server, _ = store
    for first in (0, 40):
        path = write_shard(tmp_path / "x.tar", mixed_samples(6, first))
        server.put("again", "x.tar", path.read_bytes())
        assert hashes("gs://again/", 6) == hashes(str(path), 6)


def test_a_moment_of_trouble_is_waited_out(store):
    server, folder = store
    (shard,) = expand_shards("gs://data/train/shard-000.tar", SETTINGS)
    answers = iter([503])
    server.fault = lambda path: next(answers, None)
    assert open_shard(shard).read(5, 9) == (folder / shard.name).read_bytes()[5:14]


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_do_not_open_it_are_said_at_once(store, status):
    """Also those that have expired since the run began."""
    server, _ = store
    (shard,) = expand_shards("gs://data/train/shard-000.tar", SETTINGS)
    server.requests.clear()
    server.fault = lambda path: status
    with pytest.raises(UserError, match=r"shard-000\.tar: 9 bytes at offset 5: may not be read with the credentials of this process") as error:
        open_shard(shard).read(5, 9)
    assert "tries" not in str(error.value) and len(downloads(server)) == 1
