"""Threads, worker processes and the training loop itself give the same bytes and pixels, from any place on, on any number of ranks."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import random

import numpy as np
import pytest
import torch

from fusiontrain.data.arena import Arena
from fusiontrain.data.batch_arrays import batch_arrays, most_bytes
from fusiontrain.data.collate import collate
from fusiontrain.data.execute.processes import Workers
from fusiontrain.data.loader import Loader, LoaderState
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import document
from fusiontrain.testing.shards import write_shards
from fusiontrain.types import PackedSequence

BATCH = 16
SAMPLES = 72
EXECUTORS = [("threads", 0), ("threads", 1), ("threads", 3), ("processes", 1), ("processes", 2), ("processes", 3)]
"""(kind, number of workers); none: in the training loop."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), shards=3, samples=SAMPLES // 3)


@pytest.fixture(scope="module")
def pools():
    """Worker processes that all loaders of this file share."""
    shared = {count: Workers(count) for count in (1, 2, 3)}
    yield shared
    for workers in shared.values():
        workers.close()


def make_loader(shards: str, executor: tuple[str, int] = ("threads", 0), pools=None, split="train", rank=0, world_size=1, **overrides) -> Loader:
    kind, count = executor
    settings = {
        "data.sources": [{"path": shards}], "data.validation_sources": [{"path": shards}], "data.executor": kind, "data.num_workers": count,
        "data.pack_window_documents": 24, "train.global_batch_sequences": BATCH, "train.micro_batch_sequences": 1,
        "data.prefetch_bytes": 500_000, **overrides,
    }  # fmt: skip
    config = tiny_config(settings)
    return Loader(config, load_tokenizer(config), split, rank, world_size, pools[count] if pools and kind == "processes" else None)


def digest(batch) -> str:
    """A hash over every tensor and every host number of a micro-batch."""
    state = hashlib.sha256()

    def add(record) -> None:
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            if isinstance(value, torch.Tensor):
                state.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
            elif field.name == "payloads":
                for payload in value.values():
                    add(payload)
            else:
                state.update(repr(value).encode())

    add(batch)
    return state.hexdigest()


def run_ranks(shards, executor, pools, world_size, start, steps) -> tuple[list[dict[int, str]], list[LoaderState]]:
    """Each step's sequences, number -> digest, over all ranks, and the state after each step, which all ranks must share. Then it crashes."""
    sequences: list[dict[int, str]] = [{} for _ in range(steps)]
    states = []
    for rank in range(world_size):
        with contextlib.closing(make_loader(shards, executor, pools, "train", rank, world_size)) as loader:
            iterator = loader.iterate(start)
            states.append([])
            if not steps:
                next(iterator)  # a crash in the midst of the first step
            for step, (batches, state) in enumerate(itertools.islice(iterator, steps)):
                planned = loader.plan.share(state.step - 1, rank, world_size)
                sequences[step] |= {sequence.number: digest(batch) for sequence, batch in zip(planned, batches, strict=True)}
                states[-1].append(state.to_dict())
    assert all(mine == states[0] for mine in states)
    return sequences, [LoaderState.from_dict(json.loads(json.dumps(state))) for state in states[0]]


@pytest.fixture(scope="module")
def whole(shards) -> tuple[list[dict[int, str]], list[LoaderState]]:
    """An uninterrupted run of one rank without any worker."""
    return run_ranks(shards, ("threads", 0), None, 1, 0, 40)


def test_crashes_leave_no_trace_in_the_order_of_bytes_and_pixels(shards, pools, whole):
    """Ranks and workers change at every crash; crashes before the first step is done, several in a row, are among them."""
    expected, states = whole
    assert len({digest for step in expected for digest in step.values()}) > 0.95 * 40 * BATCH  # texts alone have no noise
    chance, start, seen, tried = random.Random(7), 0, [], set()
    for crash in range(33):
        world_size = (1, 2, 4, 8, 16)[crash % 5]
        executor = EXECUTORS[crash % 6]
        steps = chance.choice([0, 1, 1, 2])
        found, after = run_ranks(shards, executor, pools, world_size, start, steps)
        seen += found
        tried.add((world_size, executor, steps))
        start = after[-1] if after else start
    assert len(seen) > 20
    assert seen == expected[: len(seen)]
    assert start == states[len(seen) - 1]
    assert {steps for _, _, steps in tried} == {0, 1, 2}


@pytest.mark.parametrize("executor", [("threads", 3), ("processes", 2)])
def test_resume_at_the_border_of_an_epoch_and_twice_in_a_row(shards, pools, whole, executor):
    expected, states = whole
    borders = [state for before, state in itertools.pairwise(states) if state.epoch > before.epoch]
    assert len(borders) >= 3
    for border in (*borders[:3], states[borders[0].step - 2]):  # the last: one step before a border
        first, after = run_ranks(shards, executor, pools, 1, border, 1)
        second, _ = run_ranks(shards, executor, pools, 2, after[0], 1)
        assert [*first, *second] == expected[border.step : border.step + 2]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_document_comes_exactly_once_per_epoch(shards, pools, executor):
    """What batches hold, against the names that the shards hold: no epoch lacks a document or has one twice."""
    seen: collections.Counter[tuple[int, str]] = collections.Counter()
    steps = 16
    for rank in range(4):
        with contextlib.closing(make_loader(shards, executor, pools, "train", rank, 4)) as loader:
            for step, (batches, _) in enumerate(itertools.islice(loader.iterate(0), steps)):
                for sequence, batch in zip(loader.plan.share(step, rank, 4), batches, strict=True):
                    keys = [ref.key for ref in batch.sources]
                    assert len(keys) == len(sequence.documents)
                    seen.update(zip((planned.epoch for planned in sequence.documents), keys, strict=True))
    assert set(seen.values()) == {1}
    names = {f"s{shard}-{number:04d}" for shard in range(3) for number in range(SAMPLES // 3)}
    complete = max(epoch for epoch, _ in seen) - 1
    assert complete >= 3
    for epoch in range(complete):
        assert {key for e, key in seen if e == epoch} == names


@pytest.mark.parametrize("executor", [("threads", 2), ("processes", 2)])
def test_validation_ends_and_begins_again(shards, pools, executor):
    with contextlib.closing(make_loader(shards, ("threads", 0), split="validation")) as loader:
        expected = [digest(batch) for batches, _ in loader.iterate(0) for batch in batches]
    with contextlib.closing(make_loader(shards, executor, pools, "validation")) as loader:
        for _ in range(2):
            assert [digest(batch) for batches, _ in loader.iterate(0) for batch in batches] == expected


@pytest.mark.parametrize("executor", [("threads", 3), ("processes", 3)])
@pytest.mark.parametrize("prefetch_bytes", [1, 1 << 28])
def test_batches_that_are_kept_stay_as_they_are(shards, pools, whole, executor, prefetch_bytes):
    """The trainer may keep any number of batches: their memory is not built into again, and nothing waits for it."""
    with contextlib.closing(make_loader(shards, executor, pools, **{"data.prefetch_bytes": prefetch_bytes})) as loader:
        kept = [batches for batches, _ in itertools.islice(loader.iterate(0), 12)]
    numbers = [[sequence.number for sequence in loader.plan.share(step, 0, 1)] for step in range(12)]
    found = [dict(zip(row, map(digest, batches), strict=True)) for row, batches in zip(numbers, kept, strict=True)]
    assert found == whole[0][:12]


@pytest.mark.parametrize("kind", ["all patches", "all text", "empty", "tiny images"])
def test_no_micro_batch_needs_more_than_most_bytes(kind):
    data = tiny_config({"data.image": {"size": 4, "patch_size": 4}, "data.sequence_length": 96}).data
    image = [("image", 1, 1)]
    documents = {
        "all patches": [document(("image", 8, 12))], "all text": [document(list(range(96)))], "empty": [],
        "tiny images": [document(*([258], *image, [259]) * 32)],
    }  # fmt: skip
    sequences = [PackedSequence(tuple(documents[kind]), 96, 5)] * 3
    memory = np.empty(most_bytes(3, data), np.uint8)
    arena = Arena(memory)
    built = batch_arrays(sequences, data, arena.allocate)
    assert arena.used <= len(memory)
    if kind == "all patches":
        assert arena.used > 0.8 * len(memory), "far too much would be set aside"
    wanted = collate(sequences, data)
    assert np.array_equal(built.columns["key_ranges"], wanted.key_ranges) and np.array_equal(built.payloads["image"]["values"], wanted.payloads["image"].values)
    with pytest.raises(ValueError, match="were asked for"):
        arena.allocate((len(memory),), np.dtype(np.uint8))
