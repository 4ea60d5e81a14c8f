"""Shards behind HTTP: the same bytes, the same batches, and no silence where a server misbehaves."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import gzip
import itertools
import json
import threading
import zlib

import numpy as np
import pytest

from fusiontrain.cli.main import main
from fusiontrain.config.schema import StorageConfig
from fusiontrain.data.index.build import build_index
from fusiontrain.data.index.shard_index import member_reader
from fusiontrain.data.index.verify import verify_shard
from fusiontrain.data.loader import Loader
from fusiontrain.data.shards import OpenShards, expand_shards
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.range_server import range_server
from fusiontrain.testing.shards import mixed_samples, png, write_shard, write_shards
from fusiontrain.utils.errors import UserError

NAMES = "/shard-{000..001}.tar"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("fusiontrain.data.storage.retry.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("fusiontrain.data.storage.retry.LONGEST_WAIT_SECONDS", 0.1)
    write_shards(tmp_path / "shards", shards=2, samples=12)
    with range_server(tmp_path / "shards") as running:
        yield running


def settings(**values):
    return StorageConfig(**{"retries": 2, "timeout_seconds": 5.0, **values})


def remote(server, **values):
    return expand_shards(server.url + NAMES, settings(**values))


def loader_of(source, **overrides):
    storage = {"data.storage.retries": 4, "data.storage.timeout_seconds": 5.0}
    config = tiny_config({"data.sources": [{"path": source}], "data.pack_window_documents": 8, **storage, **overrides})
    return Loader(config, load_tokenizer(config), "train", 0, 1)


def tensors_of(loader, steps):
    """Every tensor of the steps as bytes."""
    found = []
    with contextlib.closing(loader.iterate(0)) as iterator:
        for batches, _ in itertools.islice(iterator, steps):
            for batch in batches:
                images = batch.payloads["image"]
                parts = (batch.token_ids, batch.labels, batch.doc_ids, batch.position_ids, batch.key_ranges, images.values, images.noise_keys)
                found.append(tuple(part.numpy().tobytes() for part in parts))
    return found


# ---------------------------------------------------------------- what works


def test_shards_are_described_from_their_first_byte(server):
    shards = remote(server)
    paths = sorted(server.folder.glob("*.tar"))
    assert [(str(shard), shard.size, shard.tag) for shard in shards] == [(f"{server.url}/{p.name}", p.stat().st_size, '"one"') for p in paths]
    assert {size for _, _, size in server.requests} == {1}


def test_bytes_are_those_of_the_file(server):
    (shard, _), path = remote(server), server.folder / "shard-000.tar"
    data, file = path.read_bytes(), open_shard(shard)
    random = np.random.default_rng(0)
    for first, end in np.sort(random.integers(0, len(data), (30, 2)), axis=1).tolist():
        assert file.read(first, end - first) == data[first:end]
    assert file.read(len(data) - 5, 5) == data[-5:]
    with pytest.raises(OSError, match="5 bytes instead of 6"):
        file.read(len(data) - 5, 6)


def test_an_index_is_that_of_the_local_file_and_streams_the_shard_once(server):
    for shard in remote(server):
        server.requests.clear()
        built, expected = build_index(shard, "auto", "pixels"), build_index(server.folder / shard.name, "auto", "pixels")
        assert all(np.array_equal(a, b) for a, b in zip(vars(built).values(), vars(expected).values(), strict=True))
        assert sum(size for _, _, size in server.requests) == shard.size
        assert verify_shard(shard, built) == []


def test_a_walk_over_a_shard_of_several_blocks_reads_no_block_twice(server, monkeypatch):
    monkeypatch.setattr("fusiontrain.data.storage.files.READ_AHEAD_BLOCK", {False: 700, True: 4096})
    shard = remote(server)[0]
    server.requests.clear()
    built, expected = build_index(shard, "auto", "pixels"), build_index(server.folder / shard.name, "auto", "pixels")
    assert all(np.array_equal(a, b) for a, b in zip(vars(built).values(), vars(expected).values(), strict=True))
    blocks = [first for _, first, size in server.requests if size == 4096]
    assert len(blocks) >= 8 and blocks == sorted(set(blocks))


def test_a_sample_is_fetched_by_one_request(server):
    shard = remote(server)[0]
    members = build_index(shard, "auto", "pixels").members(3)
    server.requests.clear()
    read = member_reader(members, open_shard(shard))
    assert {suffix: zlib.crc32(read(suffix)) for suffix in members} == {suffix: member.crc for suffix, member in members.items()}
    assert len(members) == 3 and len(server.requests) == 1


def test_two_epochs_over_http_are_those_of_local_files(server):
    expected = tensors_of(loader_of(str(server.folder)), 16)
    assert tensors_of(loader_of(server.url + NAMES), 16) == expected
    assert len(set(expected)) == 16
    epochs = loader_of(server.url + NAMES).plan
    assert max(document.epoch for step in range(16) for sequence in epochs.step(step) for document in sequence.documents) >= 2


def test_threads_a_slow_server_and_every_fault_in_turn_change_nothing(server):
    expected = tensors_of(loader_of(str(server.folder)), 12)
    faults = itertools.cycle(["503", "short", None, "reset", "whole", None, "other", "500", None, "429"])
    server.fault, server.latency_seconds = lambda number, path: next(faults), 0.005
    assert tensors_of(loader_of(server.url + NAMES, **{"data.num_workers": 3, "data.storage.retries": 40}), 12) == expected


def test_reads_that_are_tried_again_hold_no_memory_of_batches_for_good(server):
    """Their exceptions lie in cycles that hold the batch that was being built; the loader must not wait for the garbage collector to come by."""
    expected = tensors_of(loader_of(str(server.folder)), 12)
    faults = itertools.cycle(["short", None, "reset", None])
    server.fault = lambda number, path: next(faults)
    gc.disable()
    try:
        smallest = {"data.num_workers": 3, "data.storage.retries": 12, "data.prefetch_bytes": 1}
        assert tensors_of(loader_of(server.url + NAMES, **smallest), 12) == expected
    finally:
        gc.enable()


def test_many_threads_read_one_shard(server):
    shard, data = remote(server)[0], (server.folder / "shard-000.tar").read_bytes()
    shards, wrong = OpenShards(), []

    def read(seed):
        for first, end in np.sort(np.random.default_rng(seed).integers(0, len(data), (10, 2)), axis=1).tolist():
            if shards.file(shard).read(first, end - first) != data[first:end]:
                wrong.append((first, end))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(server.requests) >= 60


def test_commands_take_urls_and_keep_the_index_in_the_cache(server, tmp_path, capsys):
    assert main(["data", "index", server.url + NAMES, "--tokenizer", "bytes", "--workers", "2", "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    assert main(["data", "index", str(server.folder), "--tokenizer", "bytes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == there
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "fusiontrain" / "index").glob("*/*")}
    assert len(kept) == 6, "an index and the tokens of two shards, and a manifest of either"
    server.requests.clear()
    assert len(loader_of(server.url + NAMES).sources[0]) == 24
    assert {size for _, _, size in server.requests} == {1}, "the index that is there is used"
    assert main(["data", "verify", server.url + NAMES, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"samples": 24, "problems": 0}
    assert main(["data", "inspect", f"{server.url}/shard-000.tar", "--sample", "2"]) == 0
    assert "number 2 is told here" in capsys.readouterr().out
    assert main(["data", "index", server.url + NAMES, "--out", str(tmp_path / "elsewhere")]) == 0
    assert len(list((tmp_path / "elsewhere").glob("*/*.index"))) == 2


def test_a_changed_shard_is_indexed_anew_by_the_next_run(server):
    assert len(loader_of(f"{server.url}/shard-000.tar").sources[0]) == 12
    write_shard(server.folder / "shard-000.tar", mixed_samples(12, first=50))
    server.etag = '"two"'
    loader = loader_of(f"{server.url}/shard-000.tar")
    assert loader.fields == loader_of(str(server.folder / "shard-000.tar")).fields


def test_samples_of_remote_shards_can_be_excluded(server, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"shard": f"{server.url}/shard-000.tar", "key": "s0-0003"}))
    assert main(["data", "index", server.url + NAMES, "--exclude", str(file)]) == 0
    assert len(loader_of(server.url + NAMES).sources[0]) == 23


def test_a_compressed_shard_behind_http(server):
    plain = server.folder / "shard-000.tar"
    (server.folder / "z.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    shard = expand_shards(f"{server.url}/z.tar.gz", settings())[0]
    index, expected = build_index(shard, "auto", "pixels"), build_index(plain, "auto", "pixels")
    assert np.array_equal(index.crcs, expected.crcs) and np.array_equal(index.offsets, expected.offsets)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_json_lines_behind_http(server, name):
    lines = b"".join(json.dumps({"text": f"line {n}"}).encode() + b"\n" for n in range(9))
    (server.folder / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    (shard,) = expand_shards(f"{server.url}/{name}", settings())
    index, file = build_index(shard, "auto", "pixels"), open_shard(shard)
    assert [member_reader(index.members(row), file)("json") for row in range(len(index))] == lines.splitlines()


# ---------------------------------------------------------------- what fails, and how it says so


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("503", "status 503"),
        ("short", "IncompleteRead|ended after"),
        ("reset", "Remote end closed"),
        ("whole", r"whole file \(status 200\) where a range was asked for"),
        ("gzip", "compresses a range"),
        ("other", r"another range \(bytes 101-150/\d+, 50 bytes\) than bytes 100-149"),
    ],
)
def test_after_the_last_try_the_error_names_shard_offset_and_cause(server, fault, cause):
    shard = remote(server)[0]
    server.requests.clear()
    server.fault = lambda number, path: fault
    with pytest.raises(UserError, match=rf"/shard-000\.tar: 50 bytes at offset 100: .*({cause}).*; given up after 3 tries") as error:
        open_shard(shard).read(100, 50)
    assert "\n" not in str(error.value)
    assert len(server.requests) == 3


def test_one_good_answer_among_failures_is_enough(server):
    shard = remote(server)[0]
    server.requests.clear()
    server.fault = lambda number, path: ["503", "short", None][number]
    assert open_shard(shard).read(100, 50) == (server.folder / "shard-000.tar").read_bytes()[100:150]


@pytest.mark.parametrize(("slowness", "cause"), [("drip", r"only \d+ of 4000 bytes came in time"), ("silence", "timed out")])
def test_a_read_that_takes_too_long_fails(server, slowness, cause):
    shard = remote(server, timeout_seconds=1.0, retries=1)[0]
    server.fault = lambda number, path: "drip" if slowness == "drip" else None
    server.latency_seconds = 0.0 if slowness == "drip" else 2.0
    with pytest.raises(UserError, match=rf"shard-000\.tar: 4000 bytes at offset 7: .*{cause}.*after 2 tries"):
        open_shard(shard).read(7, 4000)


@pytest.mark.parametrize("change", ["etag", "size"])
def test_a_shard_that_changes_during_a_run_ends_it(server, change):
    server.etag = '"one"' if change == "etag" else None
    shard = remote(server)[0]
    server.requests.clear()
    if change == "etag":
        server.etag = '"two"'
    else:
        path = server.folder / "shard-000.tar"
        path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"shard-000\.tar: 5 bytes at offset 3: the shard has changed since the run began"):
        open_shard(shard).read(3, 5)
    assert len(server.requests) == 1


def test_bytes_that_changed_without_a_sign_are_bad_samples(server):
    """Same size, same ETag: only the checksums of the index can tell."""
    source = f"{server.url}/shard-000.tar"
    loader = loader_of(source, **{"data.max_bad_fraction": 1.0})
    path = server.folder / "shard-000.tar"
    data = bytearray(path.read_bytes())
    member = build_index(path, "auto", "pixels").members(0)["1.png"]
    data[member.offset + 5] ^= 1
    path.write_bytes(data)
    tensors_of(loader, 8)
    assert {kind for _, kind in loader.log.counts} == {"checksum"}


def test_a_dead_server_in_the_middle_of_a_training_is_no_bad_sample(server):
    loader = loader_of(server.url + NAMES, **{"data.storage.retries": 1})
    server.fault = lambda number, path: "503"
    with pytest.raises(UserError, match=r"/shard-00\d\.tar: \d+ bytes at offset \d+: the server answers with status 503"):
        tensors_of(loader, 1)
    assert loader.skipped == 0


@pytest.mark.parametrize("status", ["401", "403"])
def test_credentials_that_expire_during_a_run_are_said_at_once(server, status):
    shard = remote(server)[0]
    server.requests.clear()
    server.fault = lambda number, path: status
    with pytest.raises(UserError, match=rf"shard-000\.tar: 9 bytes at offset 5: the server answers with status {status}") as error:
        open_shard(shard).read(5, 9)
    assert len(server.requests) == 1 and "tries" not in str(error.value)


def test_what_is_not_there_is_not_tried_twice(server):
    with pytest.raises(UserError, match=r"/nothing\.tar: the server answers with status 404") as error:
        expand_shards(f"{server.url}/nothing.tar", settings())
    assert len(server.requests) == 1 and "tries" not in str(error.value)


def test_http_folders_and_unknown_stores_are_refused():
    with pytest.raises(UserError, match="HTTP cannot list a folder"):
        expand_shards("http://127.0.0.1:1/folder/", settings())
    with pytest.raises(UserError, match="no such kind of store"):
        expand_shards("gopher://x/y.tar", settings())


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_an_address_where_nobody_is_fails_at_once_at_the_start(host, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited for another try"))
    with pytest.raises(UserError, match=rf"^http://{host}/y\.tar: nobody answers \(.*(refused|resolve).*\); is the address right, and the server up\?$"):
        expand_shards(f"http://{host}/y.tar", settings(retries=8))


def test_a_server_that_is_started_again_during_a_run_is_waited_for(server):
    shard = remote(server)[0]
    away = dataclasses.replace(shard, url="http://127.0.0.1:1/shard-000.tar")
    with pytest.raises(UserError, match=r"9 bytes at offset 5: .*refused.*given up after 3 tries"):
        open_shard(away).read(5, 9)


def test_passwords_and_signatures_are_used_and_never_shown(server, caplog):
    secret = server.url.replace("http://", "http://user:hunter2@") + "/shard-000.tar?X-Signature=abcdef"
    (shard,) = expand_shards(secret, settings(retries=1))
    assert server.headers["authorization"] == "Basic dXNlcjpodW50ZXIy"
    loader = loader_of(secret, **{"data.storage.retries": 1})
    said = [str(shard), str(loader.sources[0].ref(0)), loader.sources[0].ref(0).source]
    for fault in ("503", "404", "reset", "other"):
        server.fault = lambda number, path, fault=fault: fault
        with pytest.raises(UserError) as error:
            open_shard(shard).read(0, 9)
        said.append(str(error.value))
    said += [record.getMessage() for record in caplog.records]
    assert len(said) > 8
    assert not [line for line in said if "hunter2" in line or "abcdef" in line or "user" in line]


def test_a_large_picture_is_one_request(server):
    write_shard(server.folder / "big.tar", [{"txt": b"words", "png": png(0, (700, 700))}])
    shard = expand_shards(f"{server.url}/big.tar", settings())[0]
    index = build_index(shard, "auto", "pixels")
    server.requests.clear()
    assert len(member_reader(index.members(0), open_shard(shard))("png")) > 1_000_000
    assert len(server.requests) == 1
