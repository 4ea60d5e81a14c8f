"""What a plan promises beyond its order: resume anywhere, splitting, limits, jumps, counts, and what `data plan` and `data peek` say."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import random
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fusiontrain.data.documents import Draws, arrange
from fusiontrain.data.index.shard_index import IMAGE_PIECE, TEXT_PIECE
from fusiontrain.data.loader import Loader, LoaderState
from fusiontrain.data.peek import peek
from fusiontrain.data.plan.mixture import MixedSource, Mixture
from fusiontrain.data.plan.report import report
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import interleaved, mixed_samples, png, write_shard, write_shards
from fusiontrain.utils.errors import UserError

SETTINGS = {"train.global_batch_sequences": 4, "data.pack_window_documents": 16}
AS_IT_IS = Draws(image_first=False, drop_condition=False)


def make_loader(source, split="train", rank=0, world_size=1, **overrides):
    config = tiny_config({**SETTINGS, "data.sources": [{"path": source}], "data.validation_sources": [{"path": source}], **overrides})
    return Loader(config, load_tokenizer(config), split, rank, world_size)


def planned(sequences):
    return [(s.number, s.noise_key, [(d.source, d.epoch, d.sample, d.part, d.places) for d in s.documents]) for s in sequences]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=2, samples=12)


def test_thirty_crashes_on_any_number_of_ranks_change_nothing(shards):
    """40 steps, cut at random places and resumed from the state alone, once after another, on every number of ranks that divides the batch."""
    settings = {"train.global_batch_sequences": 48}
    whole = make_loader(shards, **settings)
    expected = [planned(whole.plan.step(step)) for step in range(40)]
    sizes = [size for size in range(1, 17) if 48 % size == 0]
    draw = random.Random(0)
    state, step, found = None, 0, []
    crashes = [0, *sorted(draw.sample(range(1, 39), 30)), 40]
    for before, after in itertools.pairwise(crashes):
        world_size = draw.choice(sizes)
        loaders = [make_loader(shards, rank=rank, world_size=world_size, **settings) for rank in {0, world_size - 1}]
        for loader in loaders:
            if state is not None:
                loader.plan.begin_at(state.anchors(loader.plan.num_lanes))
        for step in range(before, after):
            shares = loaders[0].plan.shares(step, world_size)
            assert [planned(loader.plan.share(step, loader.rank, world_size)) for loader in loaders] == [planned(shares[loader.rank]) for loader in loaders]
            found.append(planned(sorted((s for share in shares for s in share), key=lambda s: s.number)))
            for loader in loaders:
                loader.plan.step(step)
        states = {json.dumps(loader._state(after).to_dict()) for loader in loaders}
        assert len(states) == 1, "the state is the same on every rank"
        state = LoaderState.from_dict(json.loads(states.pop()))
    assert found == expected


@pytest.mark.parametrize("world_size", range(1, 17))
def test_a_step_holds_the_same_sequences_for_1_to_16_ranks(shards, world_size):
    plan = make_loader(shards, **{"train.global_batch_sequences": 2 * world_size}).plan
    for step in range(3):
        assert sorted(planned(s for share in plan.shares(step, world_size) for s in share)) == sorted(planned(plan.step(step)))
        counts = plan.counts(step, world_size)
        assert len(counts) == world_size
        assert all(sum(count.values()) == 2 * 96 for count in counts)


def test_counts_are_those_of_the_batches(shards):
    for rank in range(2):
        loader = make_loader(shards, rank=rank, world_size=2)
        for step, (batches, _) in enumerate(itertools.islice(loader.iterate(0), 4)):
            count = loader.plan.counts(step, 2)[rank]
            assert sum(batch.token_counts["image"] for batch in batches) == count["image"]
            assert sum(int((batch.doc_ids >= 0).sum()) for batch in batches) == count["image"] + count["text"]


def lengths_of(kinds, tokens, length):
    data = tiny_config({"data.sequence_length": length, "data.oversize": "split"}).data
    return arrange(kinds, tokens, False, AS_IT_IS, data, begins=True)


def test_splitting_keeps_every_token_and_never_cuts_an_image():
    draw = random.Random(0)
    for _ in range(300):
        length = draw.choice([8, 9, 16, 33])
        kinds = [draw.choice([TEXT_PIECE, IMAGE_PIECE]) for _ in range(draw.randrange(1, 8))]
        tokens = [draw.choice([0, 1, 2, length - 4, length - 1, length, 3 * length + 1]) if kind == TEXT_PIECE else draw.choice([1, 4]) for kind in kinds]
        parts = lengths_of(kinds, tokens, length)
        kept = collections.Counter()
        for number, part in enumerate(parts):
            markers = 1 + (not part.cut) + 2 * sum(place.kind == IMAGE_PIECE for place in part.places)
            assert part.num_tokens == markers + sum(place.num_tokens for place in part.places) <= length
            assert part.cut == (number < len(parts) - 1)
            for place in part.places:
                assert place.first_token == kept[place.piece]
                assert place.num_tokens > 0 or not tokens[place.piece], "no document begins with what is left of nothing"
                assert place.kind == TEXT_PIECE or place.num_tokens == tokens[place.piece]
                kept[place.piece] += place.num_tokens
        assert [kept[piece] for piece in range(len(kinds))] == tokens
        whole = [place.piece for part in parts for place in part.places if place.first_token]
        assert all(tokens[piece] > length - 2 for piece in whole), "only a text longer than a sequence is split inside"


def test_an_image_longer_than_a_sequence_ends_its_sample():
    (only,) = lengths_of([TEXT_PIECE, IMAGE_PIECE, TEXT_PIECE], [3, 99, 3], 16)
    assert only.cut
    assert [place.piece for place in only.places] == [0]
    assert lengths_of([IMAGE_PIECE], [99], 16) == ()


def test_a_split_sample_is_shown_whole(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(250))
    write_shard(tmp_path / "x.tar", [interleaved([text, None, "the end"], [None, png(0), None]), *mixed_samples(3)])
    loader = make_loader(str(tmp_path), "validation", **{"data.oversize": "split"})
    sequences = [s for step in range(2) for s in loader.plan.step(step)]
    shown = {}
    for sequence in sequences:
        for plan, document in zip(sequence.documents, loader.builder.read(sequence, []).documents, strict=True):
            assert plan.num_tokens == document.num_tokens
            if plan.sample == 0:
                shown[plan.part] = document
    assert sorted(shown) == [0, 1, 2]
    ids = [i for part in range(3) for s in shown[part].segments if s.token_ids is not None for i in s.token_ids.tolist() if i < 256]
    assert bytes(ids).decode() == text + "the end"
    assert loader.plan.split == 1
    assert loader.plan.truncated == loader.plan.dropped == loader.skipped == 0


def test_mixing_by_tokens_gives_shares_of_tokens(tmp_path):
    write_shard(tmp_path / "long" / "x.tar", [interleaved(["x" * 60], [None]) for _ in range(30)])
    write_shard(tmp_path / "short" / "x.tar", [interleaved(["x" * 10], [None]) for _ in range(30)])
    sources = [{"path": str(tmp_path / "long"), "weight": 2.0}, {"path": str(tmp_path / "short"), "weight": 1.0}]
    for mix_by, expected in (("documents", 2 * 62 / 12), ("tokens", 2.0)):
        plan = make_loader("", **{"data.sources": sources, "data.mix_by": mix_by}).plan
        tokens = collections.Counter()
        for step in range(60):
            for document in (d for s in plan.step(step) for d in s.documents):
                tokens[document.source] += document.num_tokens
        assert tokens[0] / tokens[1] == pytest.approx(expected, rel=0.05)


def test_a_training_whose_sources_are_used_up_ends_with_a_sentence(shards):
    plan = make_loader(shards, **{"data.sources": [{"path": shards, "max_epochs": 2}], "data.condition_dropout": 0.0}).plan
    seen = collections.Counter()
    with pytest.raises(UserError, match=r"used up before step \d+; lower train\.steps to \d+ at most, or raise max_epochs"):
        for step in range(99):
            seen.update((d.epoch, d.sample) for s in plan.step(step) for d in s.documents)
    assert set(seen.values()) == {1}
    assert {epoch for epoch, _ in seen} == {0, 1}


def test_pictures_that_never_fit_are_said_to_be_absent(shards, tmp_path, caplog):
    make_loader(shards)
    assert "names image" not in caplog.text
    make_loader(shards, **{"data.sequence_length": 12, "data.image.size": 64, "data.image.patch_size": 4})
    assert "data.modalities names image, but none of the first 16 documents has any that fits data.sequence_length=12" in caplog.text


def test_a_jump_skips_data_and_is_resumed_past(shards):
    plain = make_loader(shards)
    jumping = make_loader(shards, **{"data.from_step": [[3, 20], [5, 1]]})
    pairs = list(itertools.islice(jumping.iterate(0), 7))
    data_steps = [0, 1, 2, 20, 21, 1, 2]
    for (batches, _), step in zip(pairs, data_steps, strict=True):
        expected, _ = next(plain.iterate(step))
        assert np.array_equal(batches[0].token_ids.numpy(), expected[0].token_ids.numpy())
    for number, (_, state) in enumerate(pairs[:-1]):
        again = make_loader(shards, **{"data.from_step": [[3, 20], [5, 1]]})
        assert jumping.fields == again.fields
        batches, _ = next(again.iterate(LoaderState.from_dict(state.to_dict())))
        assert np.array_equal(batches[0].token_ids.numpy(), pairs[number + 1][0][0].token_ids.numpy())
    forgotten = make_loader(shards)
    with pytest.raises(UserError, match=r"data\.from_step: step 4 was reached with data step 20"):
        next(forgotten.iterate(pairs[3][1]))
    assert next(forgotten.iterate(dataclasses.replace(pairs[2][1]))), "a jump may be taken back or added before it was made"


def test_the_report_counts_what_the_steps_hold(shards):
    loader = make_loader(shards)
    found = report(loader.plan, loader.config, 6, 2)
    documents = [d for step in range(6) for s in make_loader(shards).plan.step(step) for d in s.documents]
    assert found["documents"] == len(documents)
    assert found["image tokens"] == sum(d.image_tokens for d in documents)
    assert found["fill"] == f"{sum(d.num_tokens for d in documents) / (6 * 4 * 96):.4f}"
    assert "balance of cost over 2 ranks" in found


def test_peek_writes_what_the_step_saw(shards, tmp_path):
    loader = make_loader(shards)
    sequences = loader.plan.step(2)
    found = peek(sequences, loader.plan, loader.config, loader.tokenizer, tmp_path)
    rows = json.loads((tmp_path / "sources.json").read_text())
    assert found["documents"] == len(rows) == sum(len(s.documents) for s in sequences)
    for row in rows:
        images = [name for name in row["files"] if name.endswith(".png")]
        assert 4 * len(images) == row["image_tokens"]
        number = int(row["key"].rsplit("-", 1)[1]) + 12 * int(row["key"][1])
        if images and number % 4 == 0:
            with Image.open(tmp_path / images[0]) as shown:
                original = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                assert np.array_equal(np.asarray(shown), original)
        if number % 4 == 2:
            assert (tmp_path / row["files"][0]).read_text() == f"number {number} is told here"


def test_fifty_million_documents_are_planned_anywhere_without_touching_the_others():
    """Places of a huge epoch, from the mixture alone: nothing may be made per document, or this would take gigabytes."""
    size = 50_000_000
    mixture = Mixture([MixedSource(size, ((0, Fraction(1)),))], seed=0, shuffle=True)
    last = mixture.window(3 * size - 5, 10)
    assert [epoch for _, epoch, _ in last] == [2] * 5 + [3] * 5
    assert len({sample for _, _, sample in last}) == 10
    tracemalloc.start()
    mixture.window(61 * size + 12345, 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7
