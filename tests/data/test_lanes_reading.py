"""Lanes over a network: one request for a chunk of neighbours, by one rank alone, the same bytes, and memory that is bounded."""

from __future__ import annotations

import collections
import contextlib
import itertools
import random
import threading
import time

import pytest

from fusiontrain.cli.main import main
from fusiontrain.data.execute.chunks import ByteCache, joined
from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.range_server import range_server
from fusiontrain.testing.shards import mixed_samples, write_shard
from fusiontrain.utils.errors import UserError

SAMPLES, CHUNKS = 192, 12
"""Of each of two shards, and chunks in all: none of them lies in both shards."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("fusiontrain.data.storage.retry.FIRST_WAIT_SECONDS", 0.01)
    for shard in range(2):
        write_shard(tmp_path / "shards" / f"shard-{shard:03d}.tar", mixed_samples(SAMPLES, shard * SAMPLES), prefix=f"s{shard}")
    with range_server(tmp_path / "shards") as running:
        yield running


def loader_of(source, rank=0, world_size=1, **overrides):
    config = tiny_config({
        "data.sources": [{"path": source, "max_epochs": 1}], "data.io_mode": "lanes", "data.lanes": 4, "data.pack_window_documents": 24,
        "data.storage.timeout_seconds": 5.0, "train.global_batch_sequences": 8, "data.condition_dropout": 0.0, **overrides,
    })  # fmt: skip
    return Loader(config, load_tokenizer(config), "train", rank, world_size)


def remote(server):
    return server.url + "/shard-{000..001}.tar"


def steps_of(loader, steps=None):
    """Every tensor of the steps of an epoch as bytes, step by step."""
    found = []
    with contextlib.suppress(UserError), contextlib.closing(loader.iterate(0)) as iterator:
        for batches, _ in itertools.islice(iterator, steps):
            parts = [part for b in batches for part in (b.token_ids, b.labels, b.doc_ids, b.payloads["image"].values, b.payloads["image"].noise_keys)]
            found.append(b"".join(part.numpy().tobytes() for part in parts))
    return found


@pytest.mark.parametrize("executor", [("threads", 0), ("threads", 3), ("processes", 1)])
def test_one_request_for_a_chunk_and_the_same_bytes(server, executor):
    kind, workers = executor
    settings = {"data.executor": kind, "data.num_workers": workers}
    expected = steps_of(loader_of(str(server.folder)))
    loader = loader_of(remote(server), **settings)
    server.requests.clear()
    with contextlib.closing(loader):
        assert steps_of(loader) == expected
    assert len(expected) > 5
    asked = [request for request in server.requests if request[2] > 1]  # a process looks at the first byte of each shard
    assert len(asked) == len(set(asked)) == CHUNKS
    plain = loader_of(remote(server), **settings, **{"data.io_mode": "global"})
    server.requests.clear()
    with contextlib.closing(plain):
        steps_of(plain)
    assert len(server.requests) > 200, "one for each document with pictures"


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_chunk_is_asked_for_by_one_rank(server, world_size):
    """Until lanes have come to their end, whose last sequences are shared among all ranks."""
    plan = loader_of(remote(server)).plan
    steps = next(step for step in itertools.count() if not plan._lanes.is_full(2 * step + 1))
    chunks = {d.sample // 32 for step in range(steps) for s in plan.step(step) for d in s.documents if d.image_tokens}
    asked = []
    for rank in range(world_size):
        loader = loader_of(remote(server), rank, world_size)
        server.requests.clear()
        assert len(steps_of(loader, steps)) == steps > 5
        asked += server.requests
    assert len(asked) == len(set(asked)) == len(chunks) > 8
    readers = 0
    for rank in range(world_size):
        loader = loader_of(remote(server), rank, world_size, **{"data.io_mode": "global"})
        readers += len({d.sample // 32 for step in range(steps) for s in loader.plan.share(step, rank, world_size) for d in s.documents})
    assert readers > 1.5 * len(chunks), "without lanes a chunk is for several ranks"


@pytest.mark.parametrize(("most_gap", "more"), [(1 << 18, 1), (2048, 2)])
def test_a_chunk_in_two_shards_and_samples_that_are_left_out(server, tmp_path, monkeypatch, most_gap, more):
    """Excluded samples move the borders of chunks, so one lies in both shards: a request for each, and one more where a gap is too large."""
    monkeypatch.setattr("fusiontrain.data.execute.chunks.MOST_GAP_BYTES", most_gap)
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(f'{{"shard": "{server.url}/shard-000.tar", "key": "s0-{number:04d}"}}\n' for number in (0, 40, 41, 42, 191)))
    assert main(["data", "index", remote(server), "--exclude", str(file)]) == 0
    loader = loader_of(remote(server))
    assert len(loader.sources[0]) == 2 * SAMPLES - 5
    server.requests.clear()
    steps = steps_of(loader)
    assert loader.skipped == 0 and len(steps) > 5
    assert len(server.requests) == len(set(server.requests)) == CHUNKS + more
    in_order = sorted(server.requests)
    assert all(a != b or first + size <= later for (a, first, size), (b, later, _) in itertools.pairwise(in_order)), "no byte twice"


def test_little_memory_asks_again_and_changes_nothing(server, caplog):
    expected = steps_of(loader_of(str(server.folder)))
    loader = loader_of(remote(server), **{"data.chunk_cache_bytes": 1})
    server.requests.clear()
    assert steps_of(loader) == expected
    assert len(server.requests) > 20
    assert caplog.text.count("chunks are fetched again, for data.chunk_cache_bytes=1 does not hold them") == 1


def test_faults_of_the_server_are_tried_again_for_the_chunk(server):
    expected = steps_of(loader_of(str(server.folder)))
    loader = loader_of(remote(server), **{"data.storage.retries": 6, "data.num_workers": 3})
    faults = itertools.cycle(["503", "short", None, "reset", "whole", "other", None])
    server.fault = lambda number, path: next(faults)
    assert steps_of(loader) == expected
    server.fault = lambda number, path: None
    broken = loader_of(remote(server), **{"data.storage.retries": 1})
    server.fault = lambda number, path: "503"
    with pytest.raises(UserError, match=r"/shard-00\d\.tar: \d+ bytes at offset \d+: the server answers with status 503"):
        next(broken.iterate(0))
    assert broken.skipped == 0


def test_ranges_are_joined_as_a_loop_over_bytes_would():
    draw = random.Random(0)
    for _ in range(300):
        ranges = [(first, first + draw.randrange(0, 9)) for first in (draw.randrange(60) for _ in range(draw.randrange(1, 9)))]
        gap = draw.choice([0, 3, 10])
        found = joined(ranges, gap, 10**6)
        wanted = {byte for first, end in ranges for byte in range(first, end)}
        assert wanted <= {byte for first, end in found for byte in range(first, end)}
        assert all(end + gap < first for (_, end), (first, _) in itertools.pairwise(found))
        assert all(any(first == a for a, _ in ranges) and any(end == b for _, b in ranges) for first, end in found)
    assert joined([(0, 50), (50, 100), (100, 150)], 0, 100) == [(0, 100), (100, 150)]
    assert joined([(0, 500)], 0, 100) == [(0, 500)], "a member is never cut"


def test_memory_is_bounded_and_what_was_used_last_stays():
    cache, fetched = ByteCache(100), []

    def get(key, size=30):
        return cache.get(key, lambda: fetched.append(key) or bytes([key]) * size)

    for key in (1, 2, 3, 1, 4, 1, 2):
        assert get(key) == bytes([key]) * 30
    assert fetched == [1, 2, 3, 4, 2], "2 went, for 1 had been used after it"
    assert get(9, 500) == bytes([9]) * 500, "what is larger than all the memory is held alone"
    assert cache._held == sum(len(entry.data) for entry in cache._entries.values()) == 500
    get(1)
    assert cache._held == 30
    cache.clear()
    assert cache._held == 0 and not cache._entries


def test_threads_that_want_the_same_bytes_wait_for_one_fetch():
    cache, fetched = ByteCache(10**6), collections.Counter()

    def fetch(key):
        time.sleep(0.01)
        fetched[key] += 1
        if key == 3 and fetched[key] == 1:
            raise OSError("once")
        return bytes([key]) * 10

    def work(failures):
        for key in range(6):
            try:
                assert cache.get(key, lambda key=key: fetch(key)) == bytes([key]) * 10
            except OSError:
                failures.append(key)

    failures: list[int] = []
    threads = [threading.Thread(target=work, args=(failures,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [3]
    assert fetched == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1}
