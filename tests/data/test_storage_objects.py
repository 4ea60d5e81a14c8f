"""Shards in an object store: moto's S3 server, over a real connection."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import multiprocessing

import boto3
import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from fusiontrain.config.schema import StorageConfig
from fusiontrain.data.index.build import build_index
from fusiontrain.data.loader import Loader
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import mixed_samples, write_shard, write_shards
from fusiontrain.utils.errors import UserError

SETTINGS = StorageConfig(retries=1, timeout_seconds=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """(boto3 client, local folder) of a bucket `data` with the shards of the folder under `train/`."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        folder = tmp_path_factory.mktemp("shards")
        write_shards(folder, shards=3, samples=8)
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        for path in folder.glob("*.tar"):
            client.upload_file(str(path), "data", f"train/{path.name}")
        client.put_object(Bucket="data", Key="train/README.md", Body=b"no shard")
        yield client, folder
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fusiontrain.data.storage.retry.FIRST_WAIT_SECONDS", 0.01)


def hashes(source, steps=10):
    config = tiny_config({"data.sources": [{"path": source}], "data.pack_window_documents": 8, "data.storage.retries": 1})
    found = []
    with contextlib.closing(Loader(config, load_tokenizer(config), "train", 0, 1).iterate(0)) as iterator:
        for (batch,), _ in itertools.islice(iterator, steps):
            found.append((batch.token_ids.numpy().tobytes(), batch.payloads["image"].values.numpy().tobytes()))
    return found


@pytest.mark.parametrize("path", ["s3://data/train/", "s3://data/train", "s3://data/train/*.tar", "s3://data/train/shard-{000..002}.tar"])
def test_folders_globs_and_ranges_are_listed_with_size_and_etag(store, path):
    client, folder = store
    shards = expand_shards(path, SETTINGS)
    assert [str(shard) for shard in shards] == [f"s3://data/train/{name.name}" for name in sorted(folder.iterdir()) if name.suffix == ".tar"]
    for shard in shards:
        head = client.head_object(Bucket="data", Key=f"train/{shard.name}")
        assert (shard.size, shard.tag) == (head["ContentLength"], head["ETag"].strip('"'))


def test_bytes_and_indexes_are_those_of_the_files(store):
    _, folder = store
    for shard in expand_shards("s3://data/train/", SETTINGS):
        data, file = (folder / shard.name).read_bytes(), open_shard(shard)
        for first, end in np.sort(np.random.default_rng(1).integers(0, len(data), (5, 2)), axis=1).tolist():
            assert file.read(first, end - first) == data[first:end]
        built, expected = build_index(shard, "auto", "pixels"), build_index(folder / shard.name, "auto", "pixels")
        assert all(np.array_equal(a, b) for a, b in zip(vars(built).values(), vars(expected).values(), strict=True))


def test_two_epochs_over_s3_are_those_of_local_files(store):
    assert hashes("s3://data/train/", 16) == hashes(str(store[1]), 16)


def _read_in_process(shard):
    return open_shard(shard).read(512, 100)


def test_a_shard_can_be_sent_to_a_spawned_process(store):
    shard = expand_shards("s3://data/train/", SETTINGS)[0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_in_process, (shard,)) == (store[1] / shard.name).read_bytes()[512:612]


def test_what_is_missing_is_said_in_a_sentence(store):
    with pytest.raises(UserError, match=r"^s3://data/nothing\.tar: is not there$"):
        expand_shards("s3://data/nothing.tar", SETTINGS)
    with pytest.raises(UserError, match=r"^s3://data/empty/: is not there"):
        expand_shards("s3://data/empty/", SETTINGS)
    with pytest.raises(UserError, match=r"^s3://data/other/\*\.tar: no \.tar file or \.jsonl there"):
        expand_shards("s3://data/other/*.tar", SETTINGS)


@pytest.mark.parametrize("size", [2000, 600])
def test_an_object_that_is_replaced_during_a_run_ends_it(store, size):
    """By one of the same size too, whose bytes would pass for those that were indexed but for their CRC32."""
    client, _ = store
    client.put_object(Bucket="data", Key="changing.tar", Body=bytes(2000))
    (shard,) = expand_shards("s3://data/changing.tar", SETTINGS)
    assert open_shard(shard).read(500, 100) == bytes(100)
    client.put_object(Bucket="data", Key="changing.tar", Body=b"x" * size)
    with pytest.raises(UserError, match=r"^s3://data/changing\.tar: 100 bytes at offset 500: the shard has changed since the run began") as error:
        open_shard(shard).read(500, 100)
    assert "tries" not in str(error.value), "no further try mends that"


def test_an_object_that_is_removed_during_a_run_ends_it(store):
    client, _ = store
    client.put_object(Bucket="data", Key="going.tar", Body=bytes(2000))
    (shard,) = expand_shards("s3://data/going.tar", SETTINGS)
    client.delete_object(Bucket="data", Key="going.tar")
    with pytest.raises(UserError, match=r"^s3://data/going\.tar: 9 bytes at offset 5: is gone, or the shard has changed since the run began"):
        open_shard(shard).read(5, 9)


def test_a_short_answer_is_no_answer():
    """Of a store without tags, whose object became shorter."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/short.tar", bytes(2000))
    (shard,) = expand_shards("memory://bucket/short.tar", SETTINGS)
    memory.pipe_file("/bucket/short.tar", bytes(600))
    with pytest.raises(UserError, match=r"short\.tar: 500 bytes at offset 500: .*100 of 500 bytes.*given up after 2 tries"):
        open_shard(shard).read(500, 500)
    memory.rm("/bucket/short.tar")


def test_an_overwritten_object_is_another_shard_to_the_next_run(store, tmp_path):
    client, _ = store
    for first in (0, 40):
        client.upload_file(str(write_shard(tmp_path / "x.tar", mixed_samples(6, first))), "data", "again/x.tar")
        assert hashes("s3://data/again/", 6) == hashes(str(tmp_path / "x.tar"), 6)


def test_a_store_that_is_away_is_said_with_shard_and_offset_and_without_keys(store, monkeypatch):
    (shard,) = expand_shards("s3://data/train/shard-000.tar", SETTINGS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.filesystem("s3").clear_instance_cache()
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"shard-000\.tar: 9 bytes at offset 5: .*127\.0\.0\.1:9.*given up after 2 tries") as error:
        open_shard(shard).read(5, 9)
    assert "hunter2" not in str(error.value)
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_read_that_hangs_is_ended(store, monkeypatch):
    async def hang(*args, **kwargs):
        await asyncio.sleep(60)

    (found,) = expand_shards("s3://data/train/shard-000.tar", SETTINGS)
    shard = dataclasses.replace(found, settings=StorageConfig(retries=0, timeout_seconds=0.2))
    monkeypatch.setattr("s3fs.core.S3FileSystem._call_s3", hang)
    with pytest.raises(UserError, match=r"shard-000\.tar: 9 bytes at offset 5: no whole answer within 0\.2 seconds"):
        open_shard(shard).read(5, 9)


def test_any_other_store_that_fsspec_knows():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a.tar", b"0123456789")
    (shard,) = expand_shards("memory://bucket/", SETTINGS)
    assert open_shard(shard).read(3, 4) == b"3456"
