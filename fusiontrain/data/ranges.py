"""The mask as data: for every query one interval of keys per slice of the batch, and the transpose.

The rule (Transfusion 3, figure 4): a query sees a key of its own document that comes no later in reading order, or that lies in its own
bidirectional segment. That is a prefix of the document, so with documents and tokens in reading order inside a slice, the keys of a query are
one interval per slice, and so are the queries of a key. Padding sees itself alone.
"""

from __future__ import annotations

import itertools

import numpy as np

from fusiontrain.types import PADDING_DOC_ID


def dense_mask(doc_ids: np.ndarray, order_ids: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """The rule itself, [T, T] bool (query, key): the oracle that the intervals are tested against."""
    same_document = (doc_ids[:, None] == doc_ids[None]) & (doc_ids != PADDING_DOC_ID)[:, None]
    earlier = order_ids[None] <= order_ids[:, None]
    same_segment = (segment_ids[:, None] == segment_ids[None]) & (segment_ids >= 0)[:, None]
    itself = np.eye(len(doc_ids), dtype=bool)
    return (same_document & (earlier | same_segment)) | ((doc_ids == PADDING_DOC_ID)[:, None] & itself)


def mask_ranges(
    doc_ids: np.ndarray, order_ids: np.ndarray, segment_ids: np.ndarray, slice_bounds: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of rows, as [T, G, 2] int32: (key_ranges, query_ranges).

    Every slice must hold documents in ascending `doc_ids` and tokens in ascending order, padding last. Costs one sort of T numbers.
    """
    real = doc_ids != PADDING_DOC_ID
    documents = np.where(real, doc_ids, doc_ids.max(initial=0) + 1).astype(np.int64)
    # One number per row that sorts as (document, place); `sorted_rows` are the rows of all slices in reading order, padding last.
    places = documents * (int(order_ids.max(initial=0)) + 1) + np.where(real, order_ids, 0)
    sorted_rows = np.argsort(places, kind="stable")
    first_key, last_query = _runs(documents, sorted_rows)
    first_query, last_key = _segment_reach(*_runs(places, sorted_rows), segment_ids)
    shape = (len(doc_ids), len(slice_bounds) - 1, 2)
    key_ranges, query_ranges = np.empty(shape, np.int32), np.empty(shape, np.int32)
    for g, (low, high) in enumerate(itertools.pairwise(slice_bounds)):
        # before[n]: up to which row the first n rows in reading order fill the slice, whose rows are in that order too.
        before = np.full(len(doc_ids) + 1, low, np.int32)
        before[1:] += np.cumsum((sorted_rows >= low) & (sorted_rows < high), dtype=np.int32)
        for ranges, begin, end in ((key_ranges, first_key, last_key), (query_ranges, first_query, last_query)):
            ranges[:, g, 0] = before.take(begin)
            ranges[:, g, 1] = before.take(end)
    _padding_sees_itself(key_ranges, ~real, slice_bounds)
    _padding_sees_itself(query_ranges, ~real, slice_bounds)
    return key_ranges, query_ranges


def _runs(values: np.ndarray, sorted_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row, between which numbers [begin, end) of `sorted_rows` those of its value lie. sorted_rows: the rows by rising value."""
    heads = _run_heads(values[sorted_rows])
    lengths = np.diff(heads, append=len(values))
    begins, ends = np.empty_like(sorted_rows), np.empty_like(sorted_rows)
    begins[sorted_rows] = np.repeat(heads, lengths)
    ends[sorted_rows] = np.repeat(heads + lengths, lengths)
    return begins, ends


def _segment_reach(first: np.ndarray, last: np.ndarray, segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest `first` and the highest `last` of a row's bidirectional segment; the row's own where it is causal."""
    inside = segment_ids >= 0
    if not inside.any():
        return first, last
    lowest = np.full(segment_ids.max() + 2, np.iinfo(np.int64).max)  # the last is for -1, those of no segment
    highest = np.full(segment_ids.max() + 2, -1)
    heads = _run_heads(segment_ids)
    np.minimum.at(lowest, segment_ids[heads], np.minimum.reduceat(first, heads))
    np.maximum.at(highest, segment_ids[heads], np.maximum.reduceat(last, heads))
    return np.where(inside, lowest[segment_ids], first), np.where(inside, highest[segment_ids], last)


def _run_heads(values: np.ndarray) -> np.ndarray:
    """Where each run of equal neighbours begins."""
    return np.flatnonzero(np.concatenate([[len(values) > 0], values[1:] != values[:-1]]))


def _padding_sees_itself(ranges: np.ndarray, padding: np.ndarray, slice_bounds: tuple[int, ...]) -> None:
    """Each padding row gets the interval of its own row in its own slice, and an empty one, as far up as any, in the others."""
    rows = np.flatnonzero(padding)
    for g, (low, high) in enumerate(itertools.pairwise(slice_bounds)):
        inside = (rows >= low) & (rows < high)
        ranges[rows, g, 0] = np.where(inside, rows, ranges[rows, g, 1])
        ranges[rows, g, 1] = np.where(inside, rows + 1, ranges[rows, g, 1])
