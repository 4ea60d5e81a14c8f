"""What has broken the order of the data in other loaders: borders of epochs, resuming twice, global generators, salted hashes, 32-bit numbers,
forks, lists that grow."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
from contextlib import closing

import numpy as np
import pytest
import torch

from fusiontrain.cli.main import main
from fusiontrain.data.index.tokens import TokenCache
from fusiontrain.data.jsonl import shard_samples
from fusiontrain.data.loader import Loader, LoaderState
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import interleaved, mixed_samples, png, read_members, write_shard, write_shards
from fusiontrain.utils.errors import UserError

SETTINGS = {"train.global_batch_sequences": 4, "data.pack_window_documents": 16}


def make_loader(source, split="train", **overrides):
    config = tiny_config({**SETTINGS, "data.sources": [{"path": str(source)}], **overrides})
    return Loader(config, load_tokenizer(config), split, 0, 1)


def order_of(loader, steps):
    return [[(d.epoch, d.sample) for s in loader.plan.step(step) for d in s.documents] for step in steps]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=2, samples=12)


def test_a_resume_at_the_border_of_an_epoch_and_twice_in_a_row(shards):
    """Saved at every step around each border, loaded, saved again without a step between, and loaded again."""
    whole = make_loader(shards)
    expected = order_of(whole, range(14))
    epochs = [min(epoch for epoch, _ in step) for step in expected]
    borders = [step for step, (before, after) in enumerate(itertools.pairwise(epochs), 1) if before != after]
    assert len(borders) >= 2
    states = {state.step: state for _, state in itertools.islice(make_loader(shards).iterate(0), 13)}
    for step in sorted({place for border in borders for place in (border - 1, border, border + 1) if 0 < place < 13}):
        state = states[step]
        for _ in range(2):
            loader = make_loader(shards)
            loader.plan.begin_at(state.anchors(loader.plan.num_lanes))
            state = LoaderState.from_dict(json.loads(json.dumps(loader._state(step).to_dict())))
            assert state == states[step]
        assert order_of(loader, range(step, 14)) == expected[step:]


def test_a_resume_before_the_first_batch_begins_at_the_beginning(shards):
    loader = make_loader(shards)
    begin = LoaderState(0, 0, loader.fields)
    (first, _), (again, _) = next(loader.iterate(begin)), next(make_loader(shards).iterate(0))
    assert torch.equal(first[0].token_ids, again[0].token_ids)


def test_generators_of_other_people_are_left_alone(shards):
    def state():
        return repr((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))

    before = state()
    random_first = next(make_loader(shards).iterate(0))[0][0].token_ids
    assert state() == before
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(next(make_loader(shards).iterate(0))[0][0].token_ids, random_first)


PRINT_ORDER = """
import sys
from fusiontrain.data.index.cache import index_sources
from fusiontrain.data.plan.plan import Plan
from fusiontrain.data.plan.fields import fingerprint, plan_fields
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
config = tiny_config({"train.global_batch_sequences": 4, "data.pack_window_documents": 16, "data.sources": [{"path": sys.argv[1]}]})
tokenizer = load_tokenizer(config)
sources = index_sources(config.data.sources, config.data, tokenizer)
plan = Plan(config, sources, tokenizer, training=True)
print(fingerprint(plan_fields(config, sources, tokenizer)), [[(d.epoch, d.sample) for s in plan.step(n) for d in s.documents] for n in range(3)])
"""


def test_salted_hashes_and_locales_change_nothing(shards):
    """Another process, another salt of `hash`, another locale to sort by."""
    expected = make_loader(shards)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "LC_ALL": "et_EE.UTF-8"}
    printed = subprocess.run([sys.executable, "-c", PRINT_ORDER, shards], capture_output=True, text=True, check=True, env=environment).stdout
    assert printed.strip() == f"{expected.fingerprint} {order_of(expected, range(3))}"


def test_the_same_key_in_two_shards_is_two_samples(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", mixed_samples(6, 10 * number))
    loader = make_loader(tmp_path, **{"data.condition_dropout": 0.0})
    seen = {(ref.shard, ref.key) for batches, _ in itertools.islice(loader.iterate(0), 4) for batch in batches for ref in batch.sources}
    assert len(seen) == 12
    assert len({key for _, key in seen}) == 6


def test_token_ids_beyond_the_four_billionth(tmp_path):
    """A sparse file: ids that only a 64-bit number can place, in ids and in bytes."""
    first, ids = 2**32 + 5, np.array([7, 8, 65_535], np.uint16)
    with (tmp_path / "x.tokens").open("wb") as file:
        file.seek(64 + 2 * first)
        file.write(ids.tobytes())
    start = np.array([0, first, first + 3], np.int64)
    cache = TokenCache(tmp_path / "x.tokens", 64, np.dtype(np.uint16), np.array([0, 3], np.int32), start)
    with closing(open_shard(cache.path)) as file:
        assert cache.read(file, 1).tolist() == ids.tolist()


def test_a_megabyte_of_text_and_two_hundred_images_lose_nothing(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1 << 20))
    write_shard(tmp_path / "x.tar", [interleaved([text], [None]), interleaved([None] * 200, [png(number) for number in range(200)])])
    overrides = {"data.oversize": "split", "data.sequence_length": 4096, "data.validation_sources": [{"path": str(tmp_path)}]}
    plan = make_loader(tmp_path, split="validation", **overrides).plan
    parts = {}
    for step in itertools.takewhile(plan.step, itertools.count()):
        for document in (d for s in plan.step(step) for d in s.documents):
            parts.setdefault(document.sample, {})[document.part] = document
    kept = {sample: sum(place.num_tokens for part in found.values() for place in part.places) for sample, found in parts.items()}
    assert kept[0] == 1 << 20
    assert kept[1] == 200 * 4


def test_sparse_members_are_refused_and_not_read_as_holes(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    with pytest.raises(UserError, match=r"x\.tar: damaged at offset 0: members of type b'S' are not supported"):
        read_members(path)


def test_nothing_forks(tmp_path, monkeypatch):
    """A fork takes over locks, threads, CUDA and open connections in whatever state they are; every process is begun anew."""

    def fork():
        raise AssertionError("os.fork was called")

    monkeypatch.setattr(os, "fork", fork)
    shards = write_shards(tmp_path / "shards", shards=2, samples=4)
    assert main(["data", "index", shards, "--workers", "2", "--tokenizer", "bytes"]) == 0
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "words"}\n')
    assert main(["data", "convert", str(tmp_path / "*.jsonl"), str(tmp_path / "out"), "--format", "jsonl", "--workers", "2"]) == 0
    with closing(make_loader(shards, **{"data.executor": "processes", "data.num_workers": 2})) as loader:
        assert next(loader.iterate(0))[0]


def test_walking_a_shard_keeps_no_more_of_a_sample_than_its_key(tmp_path):
    """`tarfile` keeps every member that it has passed, in about 1 kB each."""
    peaks = []
    for samples in (2000, 6000):
        path = write_shard(tmp_path / f"{samples}.tar", [{"txt": b"words"}] * samples)
        tracemalloc.start()
        assert sum(1 for _ in shard_samples(path)) == samples
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 200 * 4000
