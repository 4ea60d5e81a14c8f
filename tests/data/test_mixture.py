"""Permutations without memory and exact mixing of sources."""

from __future__ import annotations

import collections
from fractions import Fraction

import numpy as np
import pytest

from fusiontrain.data.plan.mixture import MixedSource, Mixture
from fusiontrain.data.plan.permutation import CHUNK_DOCUMENTS, GROUP_CHUNKS, epoch_order, feistel
from fusiontrain.utils.errors import UserError

CONSTANT = ((0, Fraction(1)),)


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 2047, 2048, 2049, 5000, 8191])
def test_every_place_of_an_epoch_is_another_document(size):
    for order in (feistel, epoch_order):
        assert sorted(order(np.arange(size), size, 3, size).tolist()) == list(range(size))


def test_orders_of_existing_runs_never_change():
    assert feistel(np.arange(10), 10, 0).tolist() == [9, 0, 1, 2, 3, 7, 8, 4, 6, 5]
    assert feistel(np.arange(5) * 10**7, 5 * 10**7, 3, 1).tolist() == [42035034, 46443415, 11170420, 5908680, 13337202]
    assert feistel(np.array([0, 2**40]), 2**41 + 1, 5).tolist() == [1888807266143, 351616772396], "places may be beyond 32 bits"
    assert epoch_order(np.arange(8), 100, 7, 0).tolist() == [19, 53, 16, 51, 28, 7, 34, 50]
    assert epoch_order(np.array([0, 1, 2, 49_999_999]), 5 * 10**7, 7, 0, 1).tolist() == [31008416, 2074246, 42277615, 11161012]


def test_a_place_alone_is_where_it_is_among_all():
    size = 3 * CHUNK_DOCUMENTS * GROUP_CHUNKS + 17
    whole = epoch_order(np.arange(size), size, 1, 2)
    for place in range(0, size, 97):
        assert epoch_order(np.array([place]), size, 1, 2).tolist() == [whole[place]]


def test_keys_give_unrelated_orders():
    orders = [epoch_order(np.arange(1000), 1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.12
        for other in orders[:i]:
            assert (one == other).mean() < 0.01


def test_a_group_of_places_reads_whole_chunks_of_neighbours():
    size = 100 * CHUNK_DOCUMENTS * GROUP_CHUNKS
    group = np.sort(epoch_order(np.arange(CHUNK_DOCUMENTS * GROUP_CHUNKS), size, 0))
    assert (np.diff(group) > 1).sum() <= GROUP_CHUNKS
    assert np.ptp(group) > size // 2


@pytest.mark.parametrize("places", [[-1], [10]])
def test_a_place_outside_is_refused(places):
    with pytest.raises(ValueError, match="must lie in"):
        feistel(np.array(places), 10, 0)


def stream_of(mixture, count, width=7):
    return [document for first in range(0, count, width) for document in mixture.window(first, width)]


def test_a_source_leaves_after_its_epochs_and_the_others_share_what_is_left():
    weights = [((0, Fraction(weight)),) for weight in (2, 1, 1)]
    mixture = Mixture([MixedSource(10, weights[0], 3), MixedSource(20, weights[1], 1), MixedSource(50, weights[2])], seed=0, shuffle=True)
    stream = stream_of(mixture, 700)
    count = collections.Counter(source for source, _, _ in stream)
    assert count[0] == 30
    assert count[1] == 20
    assert {sample for source, epoch, sample in stream if source == 0 and epoch == 2} == set(range(10))
    assert 700 - sum(count.values()) <= 3 * 3, "each stretch may keep back a document of each source"
    assert mixture.end is None
    assert mixture.given(0, 40) == 20
    assert mixture.given(2, 40) == 10


def test_where_all_sources_are_used_up_the_stream_ends_with_every_document_given():
    sources = [MixedSource(13, ((0, Fraction("0.3")),), 2), MixedSource(29, CONSTANT, 1)]
    mixture = Mixture(sources, seed=0, shuffle=True)
    assert mixture.end is not None
    stream = stream_of(mixture, mixture.end + 50)
    assert len(stream) == len(set(stream)) == 2 * 13 + 29
    assert mixture.window(mixture.end, 100) == []


def test_a_schedule_changes_the_weights_at_its_documents():
    schedule = ((0, Fraction(1)), (100, Fraction(3)), (180, Fraction(0)))
    mixture = Mixture([MixedSource(1000, schedule), MixedSource(1000, CONSTANT)], seed=0, shuffle=False)
    assert [mixture.given(0, place) for place in (100, 140, 180, 1000)] == [50, 80, 110, 110]
    assert [mixture.given(1, place) for place in (100, 140, 180, 1000)] == [50, 60, 70, 890]
    with pytest.raises(UserError, match="weight 0 from document 180 on"):
        Mixture([MixedSource(1000, schedule)], seed=0, shuffle=False)


def test_proportions_stay_exact_where_floats_have_drifted():
    place = 3 * 10**17
    mixture = Mixture([MixedSource(10**9, ((0, Fraction("0.1")),)), MixedSource(10**9, ((0, Fraction("0.2")),))], seed=0, shuffle=True)
    assert mixture.given(0, place) == 10**17
    assert [source for source, _, _ in mixture.window(place, 3)] == [0, 1, 1]
