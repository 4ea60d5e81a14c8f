"""The mask as data: for every query one interval of keys per slice of the batch, and the transpose.

The rule (Transfusion 3, figure 4): a query sees a key of its own document that comes no later in reading order, or that lies in its own
bidirectional segment. That is a prefix of the document, so with documents and tokens in reading order inside a slice, the keys of a query are
one interval per slice, and so are the queries of a key. Padding sees itself alone.
"""

from __future__ import annotations

import itertools
from typing import Literal

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

    Every slice must hold documents in ascending `doc_ids` and tokens in ascending order, padding last. Costs O(T log T) per slice.
    """
    size = int(order_ids.max(initial=0)) + 2
    # One number per row that sorts as (document, place): within a slice it only rises, so intervals are binary searches.
    real = doc_ids != PADDING_DOC_ID
    documents = np.where(real, doc_ids, doc_ids.max(initial=0) + 1).astype(np.int64)
    places = documents * size + np.where(real, order_ids, 0)
    first, last = _segment_reach(order_ids, segment_ids)
    first_key, last_key = documents * size, documents * size + last
    first_query, last_query = documents * size + first, documents * size + size - 1
    shape = (len(doc_ids), len(slice_bounds) - 1, 2)
    key_ranges, query_ranges = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for g, (low, high) in enumerate(itertools.pairwise(slice_bounds)):
        rows = places[low:high]
        for ranges, begin, end in ((key_ranges, first_key, last_key), (query_ranges, first_query, last_query)):
            ranges[:, g, 0] = low + _search(rows, begin, "left")
            ranges[:, g, 1] = low + _search(rows, end, "right")
    _padding_sees_itself(key_ranges, ~real, slice_bounds)
    _padding_sees_itself(query_ranges, ~real, slice_bounds)
    return key_ranges, query_ranges


def _segment_reach(order_ids: np.ndarray, segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last place that a row's bidirectional segment reaches; the row's own place where it is causal."""
    first, last = order_ids.astype(np.int64), order_ids.astype(np.int64)
    inside = segment_ids >= 0
    if not inside.any():
        return first, last
    lowest = np.full(segment_ids.max() + 2, np.iinfo(np.int64).max)  # the last is for -1, those of no segment
    highest = np.full(segment_ids.max() + 2, -1)
    heads = _run_heads(segment_ids)
    np.minimum.at(lowest, segment_ids[heads], np.minimum.reduceat(order_ids, heads))
    np.maximum.at(highest, segment_ids[heads], np.maximum.reduceat(order_ids, heads))
    first[inside], last[inside] = lowest[segment_ids[inside]], highest[segment_ids[inside]]
    return first, last


def _search(rows: np.ndarray, wanted: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
    """`numpy.searchsorted`, once for neighbours that are equal: all rows of an image, or of a document, look for the same."""
    heads = _run_heads(wanted)
    return np.repeat(np.searchsorted(rows, wanted[heads], side), np.diff(heads, append=len(wanted)))


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
