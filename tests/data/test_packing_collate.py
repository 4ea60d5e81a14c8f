"""Packing and collation: budgets, labels and order, against loops."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusiontrain.data.plan.packing import best_fit_decreasing
from fusiontrain.testing.batches import random_documents
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.types import IGNORE_INDEX


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_packing_keeps_every_document_once_and_within_the_budget(lengths, capacity):
    groups = best_fit_decreasing(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= capacity for group in groups)
    fullness = sorted(sum(lengths[index] for index in group) for group in groups)
    assert len(groups) < 2 or fullness[0] + fullness[1] > capacity, "two groups that fit one would have been one"


@given(st.lists(st.integers(1, 12), max_size=30))
def test_each_document_goes_into_the_fullest_sequence_that_holds_it(lengths):
    sums: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, total in enumerate(sums) if total + length <= 12]
        if fitting:
            sums[max(fitting, key=lambda place: sums[place])] += length
        else:
            sums.append(length)
    assert sorted(sums) == sorted(sum(lengths[i] for i in group) for group in best_fit_decreasing(lengths, 12))


@pytest.mark.parametrize("length", [0, 81])
def test_a_length_that_cannot_be_packed_is_refused(length):
    with pytest.raises(ValueError, match="from 1 to the capacity of 80"):
        best_fit_decreasing([3, length], 80)


def test_labels_are_the_next_token_where_both_are_text():
    boi, eoi = 258, 259
    batch = batch_of([document([256, 7, 8, boi], ("image", 1, 2), [eoi, 9, 257])], tiny_config())
    rows = batch.doc_ids[: batch.modality_bounds[1]] >= 0
    tokens, labels = batch.token_ids[: batch.modality_bounds[1]][rows].tolist(), batch.labels[: batch.modality_bounds[1]][rows].tolist()
    assert tokens == [256, 7, 8, boi, eoi, 9, 257]
    assert labels == [7, 8, boi, IGNORE_INDEX, 9, 257, IGNORE_INDEX]
    assert batch.target_counts == {"text": 5, "image": 1}
    assert batch.position_ids[:7].tolist() == [0, 1, 2, 3, 6, 7, 8]
    image = slice(*batch.modality_bounds[1:])
    assert batch.position_ids[image].tolist() == [4, 5]
    assert (batch.labels[image] == IGNORE_INDEX).all()


@given(st.integers(0, 10**6))
def test_labels_against_a_loop(seed):
    documents = random_documents(seed, 5)
    batch = batch_of(documents, tiny_config())
    numbers = {ref.key: number for number, ref in enumerate(batch.sources)}
    for doc in documents:
        rows = (batch.doc_ids == numbers[doc.source.key]).nonzero().squeeze(1).tolist()
        at = {int(batch.order_ids[row]): row for row in rows}
        is_text = {place: row < batch.modality_bounds[1] for place, row in at.items()}
        for place, row in at.items():
            expected = int(batch.token_ids[at[place + 1]]) if is_text[place] and is_text.get(place + 1) else IGNORE_INDEX
            assert int(batch.labels[row]) == expected
    assert (batch.labels[batch.doc_ids == -1] == IGNORE_INDEX).all()
    assert batch.target_counts["text"] == int((batch.labels != IGNORE_INDEX).sum())


@given(st.integers(0, 10**6))
def test_no_token_is_lost_and_reading_order_can_be_read_back(seed):
    documents = random_documents(seed, 4)
    batch = batch_of(documents, tiny_config())
    assert batch.num_tokens % 96 == 0
    by_key = {(ref.key): doc for ref, doc in zip(batch.sources, range(99), strict=False)}
    values = batch.payloads["image"].values
    image_start = batch.modality_bounds[1]
    for doc in documents:
        rows = (batch.doc_ids == by_key[doc.source.key]).nonzero().squeeze(1)
        rows = rows[batch.order_ids[rows].argsort()]
        assert batch.order_ids[rows].tolist() == batch.position_ids[rows].tolist() == list(range(doc.num_tokens)), "both begin anew in each document"
        start = 0
        for segment in doc.segments:
            part = rows[start : start + segment.num_tokens]
            start += segment.num_tokens
            if segment.token_ids is not None:
                assert batch.token_ids[part].tolist() == segment.token_ids.tolist()
            else:
                assert torch.equal(values[part - image_start], torch.from_numpy(segment.values))
    assert sum(batch.token_counts.values()) == sum(doc.num_tokens for doc in documents)


def test_noise_belongs_to_the_sequence_and_not_to_the_batch():
    """An image's draws are the same whether its sequence is collated alone or behind another one (law 3)."""
    from fusiontrain.data.collate import collate
    from fusiontrain.types import PackedSequence

    config = tiny_config()
    first = PackedSequence((document([1], ("image", 1, 2)),), 96, 11)
    second = PackedSequence((document([2], ("image", 1, 2), seed=1), document(("image", 2, 2), seed=2)), 96, 12)
    alone, behind = (collate(sequences, config.data).payloads["image"] for sequences in ([second], [first, second]))
    assert torch.equal(alone.noise_keys, behind.noise_keys[1:])
    assert torch.equal(alone.timesteps, behind.timesteps[1:])
    assert len(set(behind.noise_keys.tolist())) == 3


def test_too_many_documents_for_the_asked_sequences_are_refused():
    with pytest.raises(ValueError, match="fill 2 sequences of 96 tokens, num_sequences=1"):
        batch_of([document(list(range(60)), seed=i) for i in range(2)], tiny_config(), 1)


def test_an_empty_batch_is_all_padding():
    batch = batch_of([], tiny_config(), 2)
    assert batch.num_tokens == 192
    assert batch.token_counts == {"text": 0, "image": 0}
    assert (batch.doc_ids == -1).all()
    assert batch.payloads["image"].values.shape == (0, 48)
    assert np.array_equal(batch.key_ranges[:, 0, 0].numpy(), np.arange(192))


def test_a_window_of_1024_interleaved_documents_fills_99_percent():
    """Documents of 100 to 800 words (2.06 tokens each) and 1 to 6 images of 256 patches, in sequences of 8,192 tokens."""
    draw = random.Random(0)
    for _ in range(3):
        lengths = [2 + draw.randrange(100, 801) * 206 // 100 + draw.randrange(1, 7) * 258 for _ in range(1024)]
        groups = best_fit_decreasing(lengths, 8192)
        assert sum(lengths) / (8192 * len(groups)) > 0.985  # the last group of a window is seldom full
        without_last = [sum(lengths[i] for i in group) for group in groups[:-1]]
        assert sum(without_last) / (8192 * len(without_last)) >= 0.99
