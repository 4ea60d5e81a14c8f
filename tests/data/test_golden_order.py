"""The order of existing runs never changes: vectors kept here, and a second, slow implementation of the same rules that gives the same.

The slow one is written from the rules in data/README.md with plain integers, lists and fractions, one document at a time; it shares no code with the
package. Where both agree and differ from the vectors, the order of existing runs was changed: then `VERSION` in `plan/fields.py` must go up.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from fusiontrain.data.index.cache import index_sources
from fusiontrain.data.plan.mixture import MixedSource, Mixture
from fusiontrain.data.plan.permutation import epoch_order, feistel
from fusiontrain.data.plan.plan import Plan
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import mixed_samples, write_shard

WORD = 2**64


def digest(values):
    return hashlib.sha256(repr(list(values)).encode()).hexdigest()[:16]


def slow_mix(number):
    number = (number + 0x9E3779B97F4A7C15) % WORD
    number = (number ^ (number // 2**30)) * 0xBF58476D1CE4E5B9 % WORD
    number = (number ^ (number // 2**27)) * 0x94D049BB133111EB % WORD
    return number ^ (number // 2**31)


def slow_hash(*keys):
    state = slow_mix(len(keys) + 1)
    for key in keys:
        state = slow_mix(state ^ slow_mix(key % WORD))
    return state // 2


def slow_uniform(*keys):
    return slow_hash(*keys) // 2**10 / 2**53


def slow_permuted(place, size, *key):
    """Six Feistel rounds over the smallest power of 4 that holds `size`, walked until the number lies below it."""
    half = 2
    while half * half < size:
        half *= 2
    while True:
        left, right = divmod(place, half)
        for number in range(6):
            left, right = right, left ^ slow_mix((right + slow_hash(*key, number)) % WORD) % half
        place = left * half + right
        if place < size:
            return place


def slow_epoch(place, size, *key):
    """Chunks of 32 neighbours, groups of 64 chunks; draws 22 (group), 21 (chunks), 23 (where the first chunk begins)."""
    group, inside = divmod(place, 2048)
    place = group * 2048 + slow_permuted(inside, min(2048, size - group * 2048), *key, 22, group)
    chunk, rest = divmod(place, 32)
    if chunk < size // 32:
        chunk = slow_permuted(chunk, size // 32, *key, 21)
    return (chunk * 32 + rest + slow_hash(*key, 23) % size) % size


def slow_stream(sizes, weights, seed, first, count):
    """(source, epoch, sample), source by source, of places first .. first + count - 1."""
    found = []
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        before, after = (math.floor(Fraction(weight, sum(weights)) * place) for place in (first, first + count))
        found += [(source, cursor // size, slow_epoch(cursor % size, size, seed, source, cursor // size)) for cursor in range(before, after)]
    return found


def slow_packed(lengths, capacity):
    """Best fit decreasing: the longest first, each into the fullest group that has room, the oldest of those."""
    groups, rooms = [], []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [(room, group) for group, room in enumerate(rooms) if room >= lengths[index]]
        if fits:
            group = min(fits)[1]
        else:
            group = len(groups)
            groups.append([])
            rooms.append(capacity)
        groups[group].append(index)
        rooms[group] -= lengths[index]
    return groups


@pytest.mark.parametrize(("size", "key"), [(1, (0,)), (2, (3,)), (10, (0,)), (17, (-1, 2**63)), (1000, (1, 2, 3)), (4096, (4,)), (2**33 + 7, (5,))])
def test_the_permutation_is_that_of_the_slow_rules(size, key):
    places = sorted({*range(min(size, 40)), size // 2, size - 1})
    assert feistel(np.array(places), size, *key).tolist() == [slow_permuted(place, size, *key) for place in places]


@pytest.mark.parametrize(("size", "key"), [(5, (0, 0, 0)), (31, (1, 0, 2)), (2048, (2, 1, 0)), (5000, (3, 0, 1)), (50_000_000, (4, 2, 9))])
def test_an_epoch_is_that_of_the_slow_rules(size, key):
    places = sorted({*range(min(size, 40)), *range(max(0, size - 40), size), size // 3})
    assert epoch_order(np.array(places), size, *key).tolist() == [slow_epoch(place, size, *key) for place in places]


def test_the_stream_of_a_mixture_is_that_of_the_slow_rules():
    sizes, weights = [70, 33, 500], [3, 1, 2]
    mixture = Mixture([MixedSource(size, ((0, Fraction(weight)),)) for size, weight in zip(sizes, weights, strict=True)], seed=6, shuffle=True)
    for first in (0, 64, 12_345, 10**12):
        assert mixture.window(first, 64) == slow_stream(sizes, weights, 6, first, 64)


GOLDEN = {"permutation": "4819cf56f6c8940b", "epoch": "19ca0b6b4079a4d6", "plan": "5cf4e31e48b0036a"}
"""Of the slow rules, computed once. A change of any of these is a change of the order of every existing run."""

LENGTH, WINDOW, STEP, DROPOUT = 96, 16, 4, 0.3
FIRST, SIZES, WEIGHTS = (0, 100), (24, 10), (2, 1)


def slow_tokens(source, epoch, sample):
    """Tokens of a document of `mixed_samples`: BOS, bytes of text, BOI + 4 patches + EOI for each image, EOS."""
    number = FIRST[source] + sample
    text = len(f"number {number} is told here")
    if number % 4 == 0 and slow_uniform(7, epoch, source, sample, 13, 2) < DROPOUT:
        text = 0  # the text before a single image is dropped
    return 2 + (text, text, text, text + len("and then"))[number % 4] + 6 * (1, 1, 0, 2)[number % 4]


def slow_plan(windows):
    """[number, noise key, [(source, epoch, sample), ...]] of every sequence of the first windows."""
    sequences = []
    for window in range(windows):
        documents = slow_stream(SIZES, WEIGHTS, 7, window * WINDOW, WINDOW)
        groups = slow_packed([slow_tokens(*document) for document in documents], LENGTH)
        for place in range(len(groups)):
            group = groups[slow_permuted(place, len(groups), 7, window, 11)]
            number = len(sequences)
            sequences.append([number, slow_hash(7, 1, number, 12), [documents[i] for i in group]])
    return sequences


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    for source, size in enumerate(SIZES):
        write_shard(folder / str(source) / "x.tar", mixed_samples(size, FIRST[source]))
    config = tiny_config({
        "seed": 7, "data.sequence_length": LENGTH, "data.pack_window_documents": WINDOW, "data.condition_dropout": DROPOUT,
        "train.global_batch_sequences": STEP,
        "data.sources": [{"path": str(folder / str(source)), "weight": weight} for source, weight in enumerate(WEIGHTS)],
    })  # fmt: skip
    tokenizer = load_tokenizer(config)
    return Plan(config, index_sources(config.data.sources, config.data, tokenizer), tokenizer, training=True)


def test_the_plan_is_that_of_the_slow_rules(plan):
    expected = slow_plan(12)
    steps = len(expected) // STEP
    assert steps > 10
    found = [sequence for step in range(steps) for sequence in plan.step(step)]
    assert [[s.number, s.noise_key, [(d.source, d.epoch, d.sample) for d in s.documents]] for s in found] == expected[: len(found)]
    assert [[d.num_tokens for d in s.documents] for s in found] == [[slow_tokens(*d) for d in s] for _, _, s in expected[: len(found)]]
    assert any(not d.places[0].kind and len(d.places) == 1 for s in found for d in s.documents), "texts alone"
    assert any(d.places[0].kind and len(d.places) == 1 for s in found for d in s.documents), "a dropped condition"


def test_the_vectors_of_existing_runs(plan):
    assert digest(slow_permuted(place, 1_000_003, 1, 2) for place in range(2000)) == GOLDEN["permutation"]
    assert digest(feistel(np.arange(2000), 1_000_003, 1, 2).tolist()) == GOLDEN["permutation"]
    assert digest(epoch_order(np.arange(2000) * 25_000, 50_000_000, 5, 0, 3).tolist()) == GOLDEN["epoch"]
    found = [[s.number, s.noise_key, [(d.source, d.epoch, d.sample, d.num_tokens) for d in s.documents]] for step in range(16) for s in plan.step(step)]
    assert digest(found) == GOLDEN["plan"]
