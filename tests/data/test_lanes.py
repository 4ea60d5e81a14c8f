"""The order of lanes: no chunk on two ranks, every document once per epoch, the same steps for any number of ranks, exact after a resume."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import random
from fractions import Fraction

import numpy as np
import pytest

from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.data.loader import Loader, LoaderState
from fusiontrain.data.plan.lanes import even_order, lane_documents
from fusiontrain.data.plan.mixture import MixedSource, Mixture
from fusiontrain.data.plan.permutation import feistel
from fusiontrain.data.plan.report import report
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import interleaved, mixed_samples, write_shard, write_shards
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import hash_key

SETTINGS = {"train.global_batch_sequences": 4, "data.pack_window_documents": 16, "data.io_mode": "lanes", "data.lanes": 4}


def make_loader(source, split="train", rank=0, world_size=1, **overrides):
    config = tiny_config({**SETTINGS, "data.sources": [{"path": source}], "data.validation_sources": [{"path": source}], **overrides})
    return Loader(config, load_tokenizer(config), split, rank, world_size)


def planned(sequences):
    return [(s.number, s.noise_key, [(d.source, d.epoch, d.sample, d.part, d.places) for d in s.documents]) for s in sequences]


def chunks_of(sequences):
    return {(d.source, d.epoch, d.sample // 32) for s in sequences for d in s.documents}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=2, samples=12)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 documents in three shards: nine chunks and a short one, some of them in two shards."""
    return write_shards(tmp_path_factory.mktemp("many"), shards=3, samples=100)


# ---------------------------------------------------------------- which documents a lane has


def slow_source(size, seed, number, epochs, shuffle):
    """(epoch, sample, ordinal of its chunk) of all documents of the first epochs of a source in order: 31 permutes chunks, 32 places the short one."""
    whole, rest = divmod(size, 32)
    found = []
    for epoch in range(epochs):
        order = feistel(np.arange(whole), whole, seed, number, epoch, 31).tolist() if shuffle else list(range(whole))
        if rest:
            order.insert(hash_key(seed, number, epoch, 32) % (whole + 1) if shuffle else whole, whole)
        for slot, chunk in enumerate(order):
            ordinal = epoch * len(order) + slot
            found += [(epoch, sample, ordinal) for sample in range(chunk * 32, min(size, chunk * 32 + 32))]
    return found


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("lanes", "window"), [(1, 50), (3, 16), (4, 1000), (7, 5)])
def test_lanes_have_the_documents_that_the_slow_rules_give_them(lanes, window, shuffle):
    sizes, weights, seed = [70, 5, 96, 333], [3, 1, 2, 0.5], 6
    sources = [MixedSource(size, ((0, Fraction(str(weight))), (700, Fraction(2)))) for size, weight in zip(sizes, weights, strict=True)]
    mixture, places = Mixture(sources, seed, shuffle), 2000 // (lanes * window) * lanes * window
    wanted = collections.defaultdict(list)
    for number, size in enumerate(sizes):
        stream = slow_source(size, seed, number, mixture.given(number, places) // size + 1, shuffle)
        for cursor, (epoch, sample, ordinal) in enumerate(stream[: mixture.given(number, places)]):
            round_ = next(r for r in itertools.count() if mixture.given(number, (r + 1) * lanes * window) > cursor)
            wanted[round_, (ordinal + hash_key(seed, number, 33)) % lanes].append((number, epoch, sample))
    seen = []
    for round_ in range(places // (lanes * window)):
        for lane in range(lanes):
            found = lane_documents(mixture, lane, lanes, round_ * lanes * window, lanes * window)
            assert sorted(found) == sorted(wanted[round_, lane])
            assert shuffle or found == wanted[round_, lane]
            seen += found
    assert len(seen) == len(set(seen)) == sum(mixture.given(number, places) for number in range(4)), "exact shares, each visit once"


def test_an_order_is_even_where_every_lane_is_as_dear_as_the_others():
    """64 lanes whose windows are of different sizes, so that none has its window's begin where another has it."""
    draw = random.Random(0)
    costs = [[256 * draw.choice(range(4, 29)) for _ in range(draw.randrange(180, 250))] for _ in range(64)]
    orders = {k: [even_order(mine, 1000 - lane, lane, 64, 64 * k, 7) for lane, mine in enumerate(costs)] for k in (1, 4)}
    for order in orders.values():
        assert all(sorted(lane) == list(range(len(mine))) for lane, mine in zip(order, costs, strict=True))

    def ratio(k, order):
        steps = []
        for turn in range(1000, 1112, k):
            loads = [sum(costs[lane][order[lane][turn + i - (1000 - lane)]] for i in range(k)) for lane in range(64)]
            steps.append(max(loads) * 64 / sum(loads))
        return sum(steps) / len(steps)

    as_packed = [list(range(len(mine))) for mine in costs]
    for k, most in ((1, 1.4), (4, 1.15)):
        assert ratio(k, orders[k]) < most < ratio(k, as_packed) - 0.1
    assert even_order([], 5, 0, 4, 16, 0) == []
    assert sorted(even_order([3, 1, 2], 5, 2, 64, 16, 0)) == [0, 1, 2], "fewer sequences in a step than lanes"


# ---------------------------------------------------------------- steps, ranks and epochs


def test_thirty_crashes_on_any_number_of_ranks_change_nothing(shards):
    settings = {"train.global_batch_sequences": 48, "data.lanes": 48}
    whole = make_loader(shards, **settings)
    expected = [planned(whole.plan.step(step)) for step in range(40)]
    sizes = [size for size in range(1, 17) if 48 % size == 0]
    draw = random.Random(0)
    state, step, found = None, 0, []
    for before, after in itertools.pairwise([0, *sorted(draw.sample(range(1, 39), 30)), 40]):
        world_size = draw.choice(sizes)
        loaders = [make_loader(shards, rank=rank, world_size=world_size, **settings) for rank in {0, world_size - 1}]
        for loader in loaders:
            if state is not None:
                loader.plan.begin_at(state.anchors(48))
        for step in range(before, after):
            shares = loaders[0].plan.shares(step, world_size)
            assert [planned(loader.plan.share(step, loader.rank, world_size)) for loader in loaders] == [planned(shares[loader.rank]) for loader in loaders]
            found.append(planned(sorted((s for share in shares for s in share), key=lambda s: s.number)))
        states = {json.dumps(loader._state(after).to_dict()) for loader in loaders}
        assert len(states) == 1, "the state is the same on every rank"
        state = LoaderState.from_dict(json.loads(states.pop()))
        assert len(state.lanes) == 48
    assert found == expected


@pytest.mark.parametrize("world_size", range(1, 17))
def test_a_step_is_the_same_for_1_to_16_ranks_and_none_shares_a_chunk(many, world_size):
    plan = make_loader(many, **{"train.global_batch_sequences": 2 * world_size, "data.lanes": 4 * world_size}).plan
    alone = make_loader(many, **{"train.global_batch_sequences": 2 * world_size, "data.lanes": 4 * world_size}).plan
    readers = collections.defaultdict(set)
    for step in range(12):
        shares = plan.shares(step, world_size)
        assert {len(share) for share in shares} == {2}
        assert sorted(planned(s for share in shares for s in share)) == planned(alone.step(step))
        for rank, share in enumerate(shares):
            for chunk in chunks_of(share):
                readers[chunk].add(rank)
        assert all(sum(count.values()) == 2 * 96 for count in plan.counts(step, world_size))
    assert {len(ranks) for ranks in readers.values()} == {1}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resume_at_any_step_gives_the_same_bytes(shards, workers):
    def digests(loader, start, count):
        found = []
        for batches, _ in itertools.islice(loader.iterate(start), count):
            parts = [part for b in batches for part in (b.token_ids, b.labels, b.doc_ids, b.payloads["image"].values, b.payloads["image"].noise_keys)]
            found.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
        loader.close()
        return found

    whole = digests(make_loader(shards), 0, 30)
    assert len(set(whole)) == 30
    states = [state for _, state in itertools.islice(make_loader(shards).iterate(0), 29)]
    for state in states[::4]:
        kept = LoaderState.from_dict(json.loads(json.dumps(state.to_dict())))
        loader = make_loader(shards, **{"data.num_workers": workers})
        assert digests(loader, kept, 1) == [whole[state.step]]
        assert loader._state(state.step).to_dict() == state.to_dict(), "saved again without a step between"
    assert digests(make_loader(shards, **{"data.num_workers": workers}), LoaderState(0, 0, {}), 2) == whole[:2]


@pytest.mark.parametrize(("lanes", "batch"), [(4, 4), (16, 4), (6, 4), (4, 8)])
def test_a_resumed_plan_does_not_plan_what_lies_behind(shards, lanes, batch):
    settings = {"data.lanes": lanes, "train.global_batch_sequences": batch}
    whole = make_loader(shards, **settings).plan
    expected = [planned(whole.step(step)) for step in range(40 * lanes // batch)]
    for step in range(len(expected) - 5, len(expected)):
        plan, packed = make_loader(shards, **settings).plan, []
        for lane in plan._lanes._lanes:
            lane._pack = lambda window, first, pack=lane._pack, packed=packed: packed.append(window) or pack(window, first)
        anchors = whole.anchors(step)
        plan.begin_at(anchors)
        assert planned(plan.step(step)) == expected[step]
        assert min(packed) >= min(anchor.window for anchor in anchors) > 2
        assert len(packed) <= 2 * lanes * max(1, batch // lanes), "of each lane the window that it is in, and perhaps the next"


@pytest.mark.parametrize("lanes", [1, 3, 4, 16])
@pytest.mark.parametrize("batch", [4, 12])
def test_every_document_comes_once_per_epoch_until_all_are_used_up(many, shards, lanes, batch):
    """Two sources with limits: what all lanes together give, to the last document; only a last step that is not full is left out."""
    sources = [{"path": many, "max_epochs": 2, "weight": 2.0}, {"path": shards, "max_epochs": 3, "weight": 1.0}]
    settings = {"data.sources": sources, "data.lanes": lanes, "train.global_batch_sequences": batch}
    plan, seen, step = make_loader("", **settings).plan, collections.Counter(), 0
    with pytest.raises(UserError, match=r"used up before step \d+; lower train\.steps to \d+ at most, or raise max_epochs"):
        for step in itertools.count():
            seen.update((d.source, d.epoch, d.sample) for s in plan.step(step) for d in s.documents)
    left = [plan._sequence(number) for number in range(step * batch, (step + 1) * batch)]
    assert None in left
    seen.update((d.source, d.epoch, d.sample) for s in left if s is not None for d in s.documents)
    assert seen == collections.Counter({(s, e, i): 1 for s, epochs, size in ((0, 2, 300), (1, 3, 24)) for e in range(epochs) for i in range(size)})


@pytest.mark.parametrize(("lanes", "batch"), [(4, 4), (8, 4), (4, 12), (8, 12)])
def test_any_step_up_to_the_ending_and_in_it_is_resumed_into(many, lanes, batch):
    settings = {"data.sources": [{"path": many, "max_epochs": 1}], "data.lanes": lanes, "data.pack_window_documents": 24, "train.global_batch_sequences": batch}
    plan = make_loader(many, **settings).plan
    steps = next(step for step in itertools.count() if plan._sequence(batch * step + batch - 1) is None)
    full = [plan._lanes.is_full((batch * step + batch - 1) // lanes) for step in range(steps)]
    assert full == sorted(full, reverse=True) and full[0] and not full[-1], "lanes end at different times"
    expected = [planned(plan.step(step)) for step in range(steps)]
    for step in range(steps):
        again = make_loader(many, **settings).plan
        anchors = plan.anchors(step)
        again.begin_at(anchors)
        assert [planned(again.step(later)) for later in range(step, steps)] == expected[step:]
        assert again.anchors(step) == anchors
        for world_size in (2, 4):
            shares = again.shares(step, world_size)
            assert {len(share) for share in shares} == {batch // world_size}
            assert sorted(planned(s for share in shares for s in share)) == expected[step]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_visits_every_document_once_and_ends(many, world_size):
    keys = []
    for rank in range(world_size):
        steps = [batches for batches, _ in make_loader(many, "validation", rank, world_size).iterate(0)]
        keys += [(ref.shard, ref.key) for batches in steps for batch in batches for ref in batch.sources]
        assert all(sum(batch.num_tokens for batch in batches) == 96 * 4 // world_size for batches in steps)
    assert len(keys) == len(set(keys)) == 300


def test_a_jump_skips_data_and_is_resumed_past(shards):
    settings = {"data.from_step": [[3, 20], [5, 1]]}
    plain, pairs = make_loader(shards), list(itertools.islice(make_loader(shards, **settings).iterate(0), 7))
    for (batches, _), step in zip(pairs, [0, 1, 2, 20, 21, 1, 2], strict=True):
        assert np.array_equal(batches[0].token_ids.numpy(), next(plain.iterate(step))[0][0].token_ids.numpy())
    for number, (_, state) in enumerate(pairs[:-1]):
        batches, _ = next(make_loader(shards, **settings).iterate(LoaderState.from_dict(state.to_dict())))
        assert np.array_equal(batches[0].token_ids.numpy(), pairs[number + 1][0][0].token_ids.numpy())


def test_weights_hold_over_all_lanes(many, shards):
    """Whole rounds of all lanes: as many documents of each source as the mixture gives in so many places, before and after its schedule."""
    sources = [{"path": many, "weight": 3.0, "weight_schedule": [[128, 0.5]]}, {"path": shards, "weight": 1.0}]
    plan = make_loader("", **{"data.sources": sources}).plan
    for rounds in (1, 2, 3, 7):
        documents = [d for lane in range(4) for window in range(rounds) for d in lane_documents(plan.mixture, lane, 4, window * 64, 64)]
        assert [sum(d[0] == source for d in documents) for source in (0, 1)] == [plan.mixture.given(source, rounds * 64) for source in (0, 1)]
    assert plan.mixture.given(0, 128) == 96
    assert plan.mixture.given(0, 128 + 300) == 96 + 100


def test_split_samples_lose_nothing(tmp_path):
    texts = ["".join(chr(97 + (i * number) % 26) for i in range(100 * number)) for number in range(1, 9)]
    write_shard(tmp_path / "x.tar", [interleaved([text], [None]) for text in texts] + mixed_samples(40))
    loader = make_loader(str(tmp_path), "validation", **{"data.oversize": "split"})
    parts = collections.defaultdict(dict)
    for step in itertools.takewhile(loader.plan.step, itertools.count()):
        for sequence in loader.plan.step(step):
            for plan, document in zip(sequence.documents, loader.builder.read(sequence, []).documents, strict=True):
                assert plan.num_tokens == document.num_tokens
                parts[plan.sample][plan.part] = bytes(i for s in document.segments for i in s.token_ids.tolist() if i < 256) if plan.sample < 8 else b""
    assert len(parts) == 48
    assert [b"".join(parts[n][part] for part in sorted(parts[n])).decode() for n in range(8)] == texts
    assert loader.plan.split == 8


def test_ranks_that_cannot_own_equally_many_lanes_are_refused_with_the_nearest_that_can(shards):
    with pytest.raises(UserError, match=r"data\.lanes=64: 3 ranks cannot own equally many; nearest numbers of ranks that can: 2, 4; a new run may have 63, 66"):
        make_loader(shards, world_size=3, **{"data.lanes": 64, "train.global_batch_sequences": 12})
    with pytest.raises(UserError, match=r"train\.global_batch_sequences=12: 8 ranks"):
        make_loader(shards, world_size=8, **{"data.lanes": 64, "train.global_batch_sequences": 12})


def test_mode_and_number_of_lanes_are_part_of_what_a_resume_compares(shards):
    lanes, fewer, plain = (make_loader(shards, **change).fields for change in ({}, {"data.lanes": 2}, {"data.io_mode": "global"}))
    assert {name for name in lanes if lanes[name] != fewer[name]} == {"data.lanes"}
    assert {name for name in {*lanes, *plain} if lanes.get(name) != plain.get(name)} == {"data.io_mode", "data.lanes"}
    assert make_loader(shards, **{"data.io_mode": "global", "data.lanes": 9}).fields == plain


def test_the_epoch_never_goes_back(shards):
    epochs = [state.epoch for _, state in itertools.islice(make_loader(shards).iterate(0), 60)]
    assert epochs == sorted(epochs)
    assert epochs[0] == 0 and epochs[-1] >= 2


def test_the_report_says_how_many_ranks_read_a_chunk_and_what_they_hold(many):
    """Against a loop over steps, ranks and documents that asks of every chunk whether it has been begun and is not over."""

    def bytes_of(members):
        return 512 + max(member.offset + member.size for member in members) - min(member.offset for member in members)

    for io_mode, alone in (("lanes", True), ("global", False)):
        loader = make_loader(many, **{"data.io_mode": io_mode, "train.global_batch_sequences": 8})
        found = report(make_loader(many, **{"data.io_mode": io_mode, "train.global_batch_sequences": 8}).plan, loader.config, 20, 4)
        visits = [
            (step, rank, (d.epoch, d.sample // 32), bytes_of(loader.sources[0].indexes[d.sample // 100].members(d.sample % 100).values()))
            for step in range(20)
            for rank, share in enumerate(loader.plan.shares(step, 4))
            for sequence in share
            for d in sequence.documents
        ]
        readers = {(rank, chunk) for _, rank, chunk, _ in visits}
        assert found["of 4 ranks read a chunk"] == f"{len(readers) / len({chunk for _, chunk in readers}):.2f}"
        assert (found["of 4 ranks read a chunk"] == "1.00") == alone
        spans = [[(step, size) for step, *who, size in visits if tuple(who) == reader] for reader in readers]
        held = collections.Counter()
        for (rank, _), span in zip(readers, spans, strict=True):
            for step in range(span[0][0], span[-1][0] + 1):
                held[step, rank] += sum(size for _, size in span)
        assert found.get("bytes of chunks that a rank holds") == (max(held.values()) if alone else None)


def test_peek_and_plan_of_the_command_line_know_lanes(many, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    config = make_loader(many, **{"data.pack_window_documents": 64}).config
    path.write_text(to_yaml(config))
    assert main(["data", "plan", str(path), "--steps", "5", "--world-size", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["of 2 ranks read a chunk"] == "1.00"
    assert said["bytes of chunks that a rank holds"] > 0
    assert main(["data", "peek", str(path), "--step", "3", "--world-size", "2", "--rank", "1", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sequences"] == 2
    rows = json.loads((tmp_path / "out" / "sources.json").read_text())
    wanted = make_loader(many, **{"data.pack_window_documents": 64}).plan.share(2, 1, 2)
    assert [row["sequence"] for row in rows] == [s.number for s in wanted for _ in s.documents]
    assert main(["data", "peek", str(path), "--step", "3", "--world-size", "3"]) == 2


GOLDEN = "4d48d7ed742b4185"


def test_the_vector_of_existing_runs(many, shards):
    """A change of this is a change of the order of every existing run with lanes: then `VERSION` in `plan/fields.py` must go up."""
    sources = [{"path": many, "weight": 2.0}, {"path": shards, "weight": 1.0}]
    plan = make_loader("", **{"data.sources": sources, "seed": 7, "data.condition_dropout": 0.3, "train.global_batch_sequences": 8}).plan
    found = [[s.number, s.noise_key, [(d.source, d.epoch, d.sample, d.num_tokens) for d in s.documents]] for step in range(16) for s in plan.step(step)]
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == GOLDEN
