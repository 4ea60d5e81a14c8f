"""The intervals against the dense rule, on random layouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontrain.data.ranges import dense_mask, mask_ranges
from fusiontrain.testing.batches import random_documents
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.types import PADDING_DOC_ID

IMAGE = ("image", 2, 2)
LAYOUTS = {
    "text alone": [[[1, 2, 3]]],
    "one token": [[[1]]],
    "image alone": [[IMAGE]],
    "image first": [[IMAGE, [1, 2]]],
    "image last": [[[1, 2], IMAGE]],
    "adjacent images": [[[1], IMAGE, IMAGE, [2]]],
    "two documents of images": [[IMAGE], [IMAGE]],
    "a text between documents with images": [[IMAGE, [1]], [[1, 2]], [[3], IMAGE]],
    "nothing": [],
}


def dense_from(ranges: np.ndarray) -> np.ndarray:
    columns = np.arange(len(ranges))
    return ((columns >= ranges[..., :1]) & (columns < ranges[..., 1:])).any(axis=1)


def check(batch, expected: np.ndarray) -> None:
    key_ranges, query_ranges = batch.key_ranges.numpy(), batch.query_ranges.numpy()
    assert np.array_equal(dense_from(key_ranges), expected)
    assert np.array_equal(dense_from(query_ranges), expected.T)
    for g, (low, high) in enumerate(zip(batch.slice_bounds, batch.slice_bounds[1:], strict=False)):
        for ranges in (key_ranges, query_ranges):
            assert (ranges[:, g] >= low).all()
            assert (ranges[:, g] <= high).all()
            assert (np.diff(ranges[low:high], axis=0) >= 0).all(), "both ends rise within a slice"


def loop_rule(batch) -> np.ndarray:
    """The sentence of the paper, pair by pair."""
    doc, order, segment = batch.doc_ids.tolist(), batch.order_ids.tolist(), batch.segment_ids.tolist()
    allowed = np.zeros((len(doc), len(doc)), bool)
    for q in range(len(doc)):
        for k in range(len(doc)):
            if doc[q] == PADDING_DOC_ID or doc[k] == PADDING_DOC_ID:
                allowed[q, k] = q == k
            elif doc[q] == doc[k]:
                allowed[q, k] = order[k] <= order[q] or (segment[q] >= 0 and segment[q] == segment[k])
    return allowed


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("document_mask", [True, False])
def test_intervals_say_what_the_rule_says(layout, document_mask):
    config = tiny_config({"data.document_mask": document_mask, "data.sequence_length": 32})
    batch = batch_of([document(*parts, seed=i) for i, parts in enumerate(layout)], config)
    expected = loop_rule(batch)
    assert np.array_equal(expected, dense_mask(batch.doc_ids.numpy(), batch.order_ids.numpy(), batch.segment_ids.numpy()))
    check(batch, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans())
def test_intervals_on_random_layouts(seed, count, document_mask):
    config = tiny_config({"data.document_mask": document_mask, "data.sequence_length": 48})
    batch = batch_of(random_documents(seed, count), config)
    check(batch, loop_rule(batch))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_any_slicing_that_keeps_order_gives_intervals(seed):
    """Not only two slices: rows spread over four, as a model with frozen, live, clean and noised slices would have them."""
    random = np.random.default_rng(seed)
    rows = [
        (doc, order, 100 * doc + order // 3 if (order // 3) % 2 else -1)
        for doc in range(random.integers(1, 5))
        for order in range(random.integers(1, 12))
    ]
    home = random.integers(0, 4, len(rows))
    ordered = sorted(range(len(rows)), key=lambda i: (home[i], i))
    doc, order, segment = (np.array([rows[i][column] for i in ordered]) for column in range(3))
    bounds = tuple(int(b) for b in np.concatenate([[0], np.cumsum(np.bincount(home, minlength=4))]))
    key_ranges, query_ranges = mask_ranges(doc, order, segment, bounds)
    expected = dense_mask(doc, order, segment)
    assert np.array_equal(dense_from(key_ranges), expected)
    assert np.array_equal(dense_from(query_ranges), expected.T)


def test_documents_of_a_sequence_see_each_other_only_without_the_document_mask():
    documents = [document([1, 2]), document([3, 4], seed=1)]
    closed = batch_of(documents, tiny_config())
    opened = batch_of(documents, tiny_config({"data.document_mask": False}))
    assert dense_from(closed.key_ranges.numpy())[:4, :4].sum() == 6
    assert dense_from(opened.key_ranges.numpy())[:4, :4].sum() == 10
