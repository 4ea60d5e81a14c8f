"""The order of the data: pure, complete, the same for any number of ranks and workers, and exact after a resume."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import itertools
import json
import threading
from fractions import Fraction

import numpy as np
import pytest

from fusiontrain.data.loader import Loader, LoaderState
from fusiontrain.data.plan.mixture import MixedSource, Mixture
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import interleaved, mixed_samples, png, write_shard, write_shards
from fusiontrain.utils.errors import UserError

SETTINGS = {"train.global_batch_sequences": 4, "data.pack_window_documents": 16}


def make_loader(source, split="train", rank=0, world_size=1, **overrides):
    config = tiny_config({**SETTINGS, "data.sources": [{"path": source}], "data.validation_sources": [{"path": source}], **overrides})
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


def mix(sizes, weights, shuffle=False, max_epochs=None):
    """A mixture of constant weights."""
    limits = max_epochs or [None] * len(sizes)
    sources = [MixedSource(size, ((0, Fraction(str(weight))),), limit) for size, weight, limit in zip(sizes, weights, limits, strict=True)]
    return Mixture(sources, seed=1, shuffle=shuffle)


def test_a_mixture_gives_exact_shares_and_every_document_once_per_epoch():
    mixture = mix([7, 5, 11], [3.0, 1.0, 0.5], shuffle=True)
    stream = [document for window in range(60) for document in mixture.window(window * 9, 9)]
    count = collections.Counter(source for source, _, _ in stream)
    assert [count[s] for s in range(3)] == [540 * 6 // 9, 540 * 2 // 9, 540 * 1 // 9]
    for source, size in enumerate([7, 5, 11]):
        visits = [(epoch, sample) for s, epoch, sample in stream if s == source]
        assert len(set(visits)) == len(visits)
        whole = max(epoch for epoch, _ in visits)
        for epoch in range(whole):
            assert {sample for e, sample in visits if e == epoch} == set(range(size))
        orders = [[sample for e, sample in visits if e == epoch] for epoch in range(whole)]
        assert len(set(map(tuple, orders))) > whole // 2, "each epoch has an order of its own"


@pytest.mark.parametrize("weights", [[1.0] * 50 + [1e-5], [1.0, 1.0, 1.0], [0.1, 0.2, 1e-9], [0.3331, 1.0]], ids=["rare", "thirds", "never", "uneven"])
@pytest.mark.parametrize("width", [1, 7, 1024])
def test_no_source_of_a_mixture_ever_goes_back(weights, width):
    mixture = mix([10**6] * len(weights), weights)
    stream = [document for window in range(20) for document in mixture.window(window * width, width)]
    for source, weight in enumerate(weights):
        samples = [sample for s, _, sample in stream if s == source]
        assert samples == list(range(len(samples)))
        assert abs(len(samples) - 20 * width * weight / sum(weights)) < 1


SETTINGS_OF_LENGTHS = {
    "plain": {"data.condition_dropout": 0.5},
    "text alone": {"data.modalities": ("text",), "model.recipe": "dense"},
    "no begin token": {"data.tokenizer": {"path": "bytes", "begin_text_token": None}},
    "cut": {"data.sequence_length": 24},
    "cut within markers": {"data.sequence_length": 29, "data.image": {"size": 8, "patch_size": 8}},
}


@pytest.mark.parametrize("settings", SETTINGS_OF_LENGTHS.values(), ids=SETTINGS_OF_LENGTHS.keys())
def test_every_document_comes_once_per_epoch_and_its_length_was_known(shards, settings):
    loader = make_loader(shards, **settings)
    length = loader.config.data.sequence_length
    seen, verdicts = collections.Counter(), []
    for step in range(60):
        for sequence in loader.plan.step(step):
            documents = loader.builder.read(sequence, verdicts).documents
            assert [document.num_tokens for document in documents] == [planned.num_tokens for planned in sequence.documents]
            assert sum(document.num_tokens for document in documents) <= length
            assert not any(verdicts)
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
    states = [state for _, state in itertools.islice(make_loader(shards).iterate(0), 13)]
    for start in (0, 1, 5, 13):
        assert steps_of(make_loader(shards, **{"data.num_workers": workers}), start, 14 - start) == whole[start:]
    for state in states:
        loader = make_loader(shards, **{"data.num_workers": workers})
        kept = LoaderState.from_dict(json.loads(json.dumps(state.to_dict())))
        assert steps_of(loader, kept, 1) == [whole[state.step]]


def test_a_resumed_plan_does_not_plan_what_lies_behind(shards):
    *_, (_, state) = itertools.islice(make_loader(shards).iterate(0), 30)
    loader = make_loader(shards)
    packed = []
    (windows,) = loader.plan._lanes._lanes
    pack = windows._pack
    windows._pack = lambda window, first: packed.append(window) or pack(window, first)
    expected = steps_of(make_loader(shards), 25, 8)
    assert steps_of(loader, state, 3) == expected[5:]
    assert min(packed) == state.window > 10
    assert len(packed) <= 4
    assert steps_of(loader, 25, 3) == expected[:3], "an earlier step can still be asked for"


def test_the_epoch_never_goes_back(shards):
    states = [state for _, state in itertools.islice(make_loader(shards).iterate(0), 40)]
    epochs = [state.epoch for state in states]
    assert epochs == sorted(epochs)
    assert epochs[0] == 0
    assert epochs[-1] >= 2


def test_no_two_sequences_of_a_run_share_their_noise(shards):
    keys = [s.noise_key for split in ("train", "validation") for step in range(8) for s in make_loader(shards, split).plan.step(step)]
    assert len(set(keys)) == len(keys) > 32


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
    assert state.to_dict() == {"step": 7, "epoch": 2, "fields": loader.fields, "window": 4, "sequence": 24, "data_step": 7, "lanes": ()}
    weighted = make_loader(shards, **{"data.sources": [{"path": shards, "weight": 2.0}]})
    assert {name for name in loader.fields if loader.fields[name] != weighted.fields[name]} == {"data.sources.0.weight"}


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
    long = interleaved(["x" * 95, None], [None, png(0)])
    write_shard(tmp_path / "x.tar", [long, *mixed_samples(3)])
    cut = make_loader(str(tmp_path), "validation")
    documents = {d.sample: d for s in cut.plan.step(0) for d in s.documents}
    assert documents[0].num_tokens == 96
    assert documents[0].image_tokens == 0
    assert cut.plan.truncated == 1
    cut.plan._lanes._lanes[0]._cache.clear()
    cut.plan.step(0)
    assert cut.plan.truncated == 1, "packing a window again counts nothing again"
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
    assert loader.log.counts == {(source, "checksum"): shown}
    findings = loader.log.take(3)
    assert len(findings) == shown
    first = min(member.offset for member in before.sources[0].indexes[0].members(0).values())
    assert {(finding["key"], finding["reason"], finding["offset"]) for finding in findings} == {("s0-0000", "checksum", first)}
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


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_an_error_in_a_thread_reaches_the_trainer(tmp_path):
    loader = make_loader(write_shards(tmp_path), **{"data.num_workers": 2})
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    with pytest.raises(UserError, match=r"shard-00\d\.tar: cannot be opened"):
        next(loader.iterate(0))
    assert not loader_threads()


def test_closing_stops_the_threads_and_a_loader_can_begin_again(shards):
    loader = make_loader(shards, **{"data.num_workers": 2})
    iterator = loader.iterate(0)
    first = digest(next(iterator)[0])
    assert loader_threads()
    loader.close()
    assert not loader_threads()
    assert not loader.builder.shards._open
    assert steps_of(loader, 0, 1) == [first]
    assert not loader_threads()


def test_more_shards_than_may_be_open(shards):
    loader = make_loader(shards)
    loader.builder.shards.limit = 1
    assert steps_of(loader, 0, 14) == steps_of(make_loader(shards), 0, 14)
    assert sum(map(len, loader.builder.shards._open.values())) == 1


def test_steps_are_the_same_for_a_step_that_spans_many_windows(shards):
    settings = {"data.pack_window_documents": 2, "train.global_batch_sequences": 32}
    loader = make_loader(shards, **settings)
    numbers = [[d.sample for s in loader.plan.step(step) for d in s.documents] for step in range(3)]
    again = make_loader(shards, **settings)
    assert [d.sample for s in again.plan.step(2) for d in s.documents] == numbers[2]
    assert sorted(list(itertools.chain(*numbers))[:24]) == list(range(24))


def test_bad_samples_of_the_index_are_counted_once_and_judged_by_all_ranks(tmp_path, caplog):
    bad = {"json": b"{"}
    write_shard(tmp_path / "x.tar", [*mixed_samples(20), *[bad] * 9])
    assert [make_loader(str(tmp_path), rank=rank, world_size=2).skipped for rank in (0, 1)] == [9, 0]
    write_shard(tmp_path / "x.tar", [*mixed_samples(20), *[bad] * 12])
    for rank in (0, 1):
        with pytest.raises(UserError, match=r"\d+ of \d+ samples are unreadable \(\d+ format\), the last being .*x\.tar: sample \d+"):
            make_loader(str(tmp_path), rank=rank, world_size=2)
    assert make_loader(str(tmp_path), **{"data.max_bad_fraction": 0.5}).skipped == 12
    with pytest.raises(UserError, match=r"^1 of 21 samples are unreadable"):
        make_loader(str(tmp_path), **{"data.max_bad_fraction": 0.0})


def test_many_sound_samples_in_the_index_do_not_excuse_bad_reads(tmp_path):
    with_images = [members for members in mixed_samples(200) if len(members) > 1]  # texts come from the token cache
    write_shard(tmp_path / "x.tar", with_images)
    loader = make_loader(str(tmp_path), **{"data.max_bad_fraction": 0.5})
    (tmp_path / "x.tar").write_bytes(bytes((tmp_path / "x.tar").stat().st_size))
    with pytest.raises(UserError, match=r"^10 of 10 samples are unreadable"):
        list(itertools.islice(loader.iterate(0), 9))


def test_latents_that_patches_do_not_divide_are_left_out_and_named(tmp_path, caplog):
    def latent(side):
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((4, side, side), np.float32))
        return {"txt": b"a", "latent.npy": buffer.getvalue()}

    write_shard(tmp_path / "x.tar", [latent(4), latent(5), latent(8)])
    image = {"size": 8, "patch_size": 2, "representation": "latents", "channels": 4}
    loader = make_loader(str(tmp_path), "validation", **{"data.image": image})
    documents = {d.sample: d.image_tokens for s in loader.plan.step(0) for d in s.documents}
    assert documents == {0: 4, 2: 16}
    assert loader.plan.unfit == 1
    assert "x.tar: sample 1 ('sample-0001'): a latent of 5 x 5 cells" in caplog.text


def test_documents_that_never_fit_are_said_before_training(tmp_path):
    write_shard(tmp_path / "x.tar", [interleaved([None], [png(0)])] * 3)
    with pytest.raises(UserError, match=r"not one document fits data\.sequence_length=8"):
        make_loader(str(tmp_path), **{"data.sequence_length": 8, "data.image": {"size": 8, "patch_size": 1}})


def test_micro_batches_are_the_step_in_parts(shards):
    whole, parts = (make_loader(shards, **{"train.micro_batch_sequences": size}) for size in (4, 1))
    (batch,), _ = next(whole.iterate(3))
    micro_batches, _ = next(parts.iterate(3))
    assert [part.num_tokens for part in micro_batches] == [96] * 4
    assert sum((part.sources for part in micro_batches), ()) == batch.sources
    assert np.array_equal(np.concatenate([part.payloads["image"].noise_keys for part in micro_batches]), batch.payloads["image"].noise_keys)
