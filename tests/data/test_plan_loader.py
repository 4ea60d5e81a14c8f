"""The order of the data: pure, complete, the same for any number of ranks and workers, and exact after a resume."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools

import numpy as np
import pytest

from fusiontrain.data.loader import Loader
from fusiontrain.data.mixture import Mixture, permutation
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import mixed_samples, png, write_shard, write_shards
from fusiontrain.utils.errors import UserError

SETTINGS = {"train.global_batch_sequences": 4, "data.pack_window_documents": 16}


def make_loader(source, split="train", rank=0, world_size=1, **overrides):
    config = tiny_config(
        {**SETTINGS, "data.sources": [{"path": source}], "data.validation_sources": [{"path": source}], **overrides}
    )
    return Loader(config, load_tokenizer(config), split, rank, world_size)


def digest(batches) -> str:
    """A hash over every tensor of a step's micro-batches."""
    state = hashlib.sha256()
    for batch in batches:
        payload = batch.payloads["image"]
        tensors = [batch.token_ids, batch.labels, batch.doc_ids, batch.key_ranges, payload.values, payload.noise_keys, payload.timesteps]
        for tensor in tensors:
            state.update(tensor.numpy().tobytes())
    return state.hexdigest()


def steps_of(loader, start, count):
    with contextlib.closing(loader.iterate(start)) as iterator:
        return [digest(batches) for batches, _ in itertools.islice(iterator, count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=2, samples=12)


def test_a_permutation_is_a_function_of_its_key():
    assert sorted(permutation(1000, 1, 2)) == list(range(1000))
    assert np.array_equal(permutation(50, 3), permutation(50, 3))
    assert not np.array_equal(permutation(50, 3), permutation(50, 4))
    assert permutation(10, 0).tolist() == [5, 7, 1, 2, 9, 3, 6, 0, 4, 8], "the order of existing runs must never change"


def test_a_mixture_gives_exact_shares_and_every_document_once_per_epoch():
    mixture = Mixture([7, 5, 11], [3.0, 1.0, 0.5], seed=1, shuffle=True)
    stream = [document for window in range(60) for document in mixture.window(window * 9, 9)]
    count = collections.Counter(source for source, _, _ in stream)
    assert [count[s] for s in range(3)] == [540 * 6 // 9, 540 * 2 // 9, 540 * 1 // 9]
    for source, size in enumerate([7, 5, 11]):
        visits = [(epoch, sample) for s, epoch, sample in stream if s == source]
        assert len(set(visits)) == len(visits)
        whole = max(epoch for epoch, _ in visits)
        for epoch in range(whole):
            assert {sample for e, sample in visits if e == epoch} == set(range(size))


def test_every_document_comes_once_per_epoch_and_its_length_was_known(shards):
    loader = make_loader(shards, **{"data.condition_dropout": 0.5})
    seen = collections.Counter()
    for step in range(40):
        for sequence in loader.plan.step(step):
            documents = loader._read(sequence).documents
            assert [document.num_tokens for document in documents] == [planned.num_tokens for planned in sequence.documents]
            assert sum(document.num_tokens for document in documents) <= 96
            seen.update((planned.epoch, planned.sample) for planned in sequence.documents)
    assert set(seen.values()) == {1}
    assert {sample for epoch, sample in seen if epoch == 0} == set(range(24))
    assert len({epoch for epoch, _ in seen}) > 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_holds_the_same_sequences_for_any_number_of_ranks(shards, world_size):
    loader = make_loader(shards)
    for step in range(10):
        alone = {sequence.number for sequence in loader.plan.share(step, 0, 1)}
        shares = [loader.plan.share(step, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {4 // world_size}
        assert {sequence.number for share in shares for sequence in share} == alone


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resume_at_any_step_gives_the_same_bytes(shards, workers):
    whole = steps_of(make_loader(shards), 0, 14)
    assert len(set(whole)) == 14
    for start in (0, 1, 5, 13):
        assert steps_of(make_loader(shards, **{"data.num_workers": workers}), start, 14 - start) == whole[start:]


def test_the_epoch_never_goes_back(shards):
    plan = make_loader(shards).plan
    epochs = [plan.epoch(step) for step in range(40)]
    assert epochs == sorted(epochs)
    assert epochs[0] == 0
    assert epochs[-1] >= 2


def test_another_seed_is_another_order(shards):
    assert steps_of(make_loader(shards, seed=1), 0, 3) != steps_of(make_loader(shards), 0, 3)


def test_state_names_what_changed(shards):
    loader = make_loader(shards)
    other = make_loader(shards, **{"data.sequence_length": 128, "seed": 5})
    changed = {name for name in loader.fields if loader.fields[name] != other.fields[name]}
    assert changed == {"data.sequence_length", "seed"}
    assert loader.fingerprint != other.fingerprint
    assert make_loader(shards, rank=1, world_size=2).fingerprint == loader.fingerprint
    _, state = next(iter(loader.iterate(6)))
    assert state.to_dict() == {"step": 7, "epoch": state.epoch, "fields": loader.fields}


def test_validation_visits_every_document_once_and_ends(shards):
    for world_size in (1, 2, 4):
        keys = []
        for rank in range(world_size):
            loader = make_loader(shards, "validation", rank, world_size)
            steps = [batches for batches, _ in loader.iterate(0)]
            keys += [ref.key for batches in steps for batch in batches for ref in batch.sources]
            assert all(sum(batch.num_tokens for batch in batches) == 96 * 4 // world_size for batches in steps)
        assert len(keys) == 24
        assert len(set(keys)) == 24


def test_ranks_get_even_numbers_of_image_tokens(tmp_path):
    write_shard(tmp_path / "x.tar", mixed_samples(64))
    loader = make_loader(str(tmp_path), **{"train.global_batch_sequences": 16})
    worst = 0.0
    for step in range(5):
        loads = [sum(s.image_tokens for s in loader.plan.share(step, rank, 4)) for rank in range(4)]
        worst = max(worst, max(loads) / (sum(loads) / 4))
    assert worst < 1.2


def test_a_world_size_that_does_not_divide_is_refused_with_the_nearest_that_do(shards):
    with pytest.raises(UserError, match=r"3 ranks cannot share it evenly; nearest sizes that they can: 3, 6"):
        make_loader(shards, rank=0, world_size=3)


def test_condition_dropout_leaves_the_image_alone_and_only_in_training(shards):
    settings = {"data.condition_dropout": 0.99}
    for split, expected in (("train", 1), ("validation", 3)):
        loader = make_loader(shards, split, **settings)
        planned = [d for step in range(3) for s in loader.plan.step(step) for d in s.documents]
        lengths = {len(d.places) + (expected == 3) for d in planned if d.image_tokens and len(d.places) < 3 and d.sample % 4 == 0}
        assert lengths == {expected}


def test_an_oversize_document_is_cut_before_its_image_or_dropped(tmp_path):
    from fusiontrain.testing.shards import interleaved

    long = interleaved(["x" * 95, None], [None, png(0)])
    write_shard(tmp_path / "x.tar", [long, *mixed_samples(3)])
    cut = make_loader(str(tmp_path), "validation")
    documents = {d.sample: d for s in cut.plan.step(0) for d in s.documents}
    assert documents[0].num_tokens == 96
    assert documents[0].image_tokens == 0
    assert cut.plan.truncated == 1
    dropped = make_loader(str(tmp_path), "validation", **{"data.oversize": "drop"})
    assert {d.sample for s in dropped.plan.step(0) for d in s.documents} == {1, 2, 3}
    assert dropped.plan.dropped == 1


def test_a_sample_that_goes_bad_is_counted_named_and_shifts_nothing(tmp_path, caplog):
    source = write_shards(tmp_path, shards=1, samples=12)
    before = make_loader(source)
    expected = [[s.number for s in before.plan.step(step)] for step in range(3)]
    path = tmp_path / "shard-000.tar"
    data = bytearray(path.read_bytes())
    offset = before.sources[0].indexes[0].members(0)["1.png"].offset
    data[offset : offset + 30] = bytes(30)
    loader = make_loader(source)  # its index was made of the sound file
    path.write_bytes(data)
    with caplog.at_level("WARNING"):
        steps = [batches for batches, _ in itertools.islice(loader.iterate(0), 3)]
    assert [[s.number for s in loader.plan.step(step)] for step in range(3)] == expected
    shown = sum(d.sample == 0 for step in range(3) for s in loader.plan.step(step) for d in s.documents)
    assert loader.skipped == shown > 0
    assert "shard-000.tar: sample 0 ('s0-0000')" in caplog.text
    keys = [ref.key for batches in steps for batch in batches for ref in batch.sources]
    assert "s0-0000" not in keys


def test_too_many_bad_samples_stop_the_run_with_a_sentence(tmp_path):
    source = write_shards(tmp_path, shards=1, samples=12)
    loader = make_loader(source)
    path = tmp_path / "shard-000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"of \d+ samples are unreadable.*max_bad_fraction"):
        list(itertools.islice(loader.iterate(0), 9))


def test_text_alone_keeps_the_markers_of_images(shards):
    loader = make_loader(shards, **{"data.modalities": ("text",), "model.recipe": "dense"})
    batches, _ = next(loader.iterate(0))
    assert batches[0].token_counts["image"] == 0
    tokens = batches[0].token_ids.tolist()
    assert tokens.count(258) == tokens.count(259) > 0
