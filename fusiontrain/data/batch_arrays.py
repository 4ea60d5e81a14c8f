"""Packed sequences to the arrays of a `Batch`: sorted by modality once, with everything the model needs to know about where a token stood.

In numpy alone, so that worker processes need no torch; `collate.py` makes the tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fusiontrain.config.schema import DataConfig
from fusiontrain.data.arena import ALIGNMENT, Allocate
from fusiontrain.data.modalities.image import normalized
from fusiontrain.data.ranges import mask_ranges
from fusiontrain.modality import IMAGE, MODALITY_NAMES, TEXT, table_of
from fusiontrain.types import IGNORE_INDEX, PADDING_DOC_ID, PackedSequence, Segment, SourceRef
from fusiontrain.utils.keyed import hash_key, keyed_uniform

LARGEST_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
ROW_DTYPES = {
    "token_ids": "i8", "labels": "i8", "label_modality_ids": "i1", "doc_ids": "i4", "order_ids": "i4", "segment_ids": "i4", "position_ids": "i4",
    "row_keys": "i8",
}  # fmt: skip
IMAGE_DTYPES = {"timesteps": "f4", "max_timesteps": "f4", "noise_keys": "i8", "is_target": "?"}


@dataclass(frozen=True)
class BatchArrays:
    """A `Batch` in numpy, with its names, shapes and dtypes.

    columns: every array with a row per token, by name. payloads: arrays of each continuous modality, by name.
    """

    columns: dict[str, np.ndarray]
    payloads: dict[str, dict[str, np.ndarray]]
    grids: dict[str, tuple[tuple[int, int], ...]]
    bounds: tuple[int, ...]
    slice_bounds: tuple[int, ...]
    num_prefix_rows: int
    num_prefix_labels: int
    target_counts: dict[str, int]
    token_counts: dict[str, int]
    sources: tuple[SourceRef, ...]


class _Span(NamedTuple):
    """A run of `length` tokens of one segment. modality: its number; order, position: those of the first token."""

    length: int
    modality: int
    doc_id: int
    segment_id: int
    order: int
    position: int


@dataclass
class _Reading:
    """A micro-batch in reading order: spans, their token ids (IGNORE_INDEX where there are none), the lengths of documents, the keys of the rows of
    each sequence, and the continuous segments of each modality with what their noise is keyed by."""

    spans: list[_Span] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    keys: list[np.ndarray] = field(default_factory=list)
    segments: dict[str, list[tuple[Segment, tuple[int, int]]]] = field(default_factory=lambda: {name: [] for name in MODALITY_NAMES})
    num_documents: int = 0
    num_segments: int = 0


def batch_arrays(
    sequences: Sequence[PackedSequence], data: DataConfig, allocate: Allocate = np.empty, frozen_prefix: bool = False
) -> BatchArrays:
    """One micro-batch of `sum of sequence.length` rows, modality-major, padding at the end of the first slice.

    frozen_prefix: text that no image of its document comes before has a slice of its own, the first, before all other text.
    allocate(shape, dtype): where the arrays go. `data.document_mask` off: the documents of a sequence see each other as one (rotary positions
    still start anew in each).
    """
    reading = _Reading()
    for sequence in sequences:
        _add_sequence(reading, sequence, data.document_mask)
    total = sum(sequence.length for sequence in sequences)
    padding = total - sum(reading.lengths)
    modalities = table_of(data.modalities)
    names = tuple(modality.name for modality in modalities)
    columns, slice_sizes = _columns(reading, padding, len(names), allocate, frozen_prefix)
    prefix = slice_sizes[0] if frozen_prefix else 0
    sizes = [prefix + slice_sizes[1], *slice_sizes[2:]] if frozen_prefix else slice_sizes
    bounds, slice_bounds = (0, *itertools.accumulate(sizes)), (0, *itertools.accumulate(slice_sizes))
    ranges = mask_ranges(columns["doc_ids"], columns["order_ids"], columns["segment_ids"], slice_bounds)
    for name, found in zip(("key_ranges", "query_ranges"), ranges, strict=True):
        columns[name] = _stored([found], total, allocate, found.dtype)
    columns["loss_weights"] = _stored([np.ones(total, np.float32)], total, allocate, np.dtype(np.float32))
    continuous = [m.name for m in modalities if not m.discrete and data.image.representation != "codes"]
    payloads = {name: _payload(reading.segments[name], patch_dim(data), allocate) for name in continuous}
    return BatchArrays(
        columns=columns,
        payloads=payloads,
        grids={name: tuple(s.grid for s, _ in reading.segments[name] if s.grid is not None) for name in payloads},
        bounds=bounds,
        slice_bounds=slice_bounds,
        num_prefix_rows=prefix,
        num_prefix_labels=int((columns["labels"][:prefix] != IGNORE_INDEX).sum()),
        target_counts={
            **_count_labels(columns, names),
            **{name: int(payload["is_target"].sum()) for name, payload in payloads.items()},
        },
        token_counts={name: size - (padding if name == TEXT.name else 0) for name, size in zip(names, sizes, strict=True)},
        sources=tuple(document.source for sequence in sequences for document in sequence.documents),
    )


def most_bytes(num_sequences: int, data: DataConfig, frozen_prefix: bool = False) -> int:
    """No micro-batch of that many sequences needs more: all tokens are patches, and every image is one patch between two markers."""
    slices = len(table_of(data.modalities)) + frozen_prefix
    row = _width([*ROW_DTYPES.values(), "f4"]) + 2 * _width(["i4", "i4"]) * slices  # with the weight and two intervals per slice
    patch = patch_dim(data) * _width(["f4"]) + _width(["i8"]) if IMAGE.name in data.modalities else 0
    images = _width(IMAGE_DTYPES.values()) / 3
    arrays = len(ROW_DTYPES) + 3 + (2 + len(IMAGE_DTYPES)) * (len(MODALITY_NAMES) - 1)
    return math.ceil(num_sequences * data.sequence_length * (row + patch + images)) + arrays * ALIGNMENT


def _add_sequence(reading: _Reading, sequence: PackedSequence, document_mask: bool) -> None:
    reading.keys.append(_row_keys(sequence))
    order, image_number = 0, 0
    for place, document in enumerate(sequence.documents):
        start, position = 0 if document_mask else order, 0
        for segment in document.segments:
            count = segment.num_tokens
            segment_id = reading.num_segments if segment.bidirectional else -1
            number = MODALITY_NAMES.index(segment.modality)
            reading.spans.append(_Span(count, number, reading.num_documents, segment_id, start + position, position))
            reading.tokens.append(np.full(count, IGNORE_INDEX) if segment.token_ids is None else segment.token_ids)
            reading.num_segments += segment.bidirectional
            if segment.values is not None:
                reading.segments[segment.modality].append((segment, (sequence.noise_key, image_number)))
                image_number += 1
            position += count
        reading.lengths.append(position)
        order += position
        if document_mask or place == len(sequence.documents) - 1:
            reading.num_documents += 1


def _row_keys(sequence: PackedSequence) -> np.ndarray:
    """A number per token of the sequence, [n] int64, from its own key on."""
    return (np.uint64(sequence.noise_key) + np.arange(sequence.num_tokens, dtype=np.uint64)).view(np.int64)


def _count_labels(columns: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, int]:
    """Labels of each modality."""
    counts = np.bincount(columns["label_modality_ids"][columns["labels"] != IGNORE_INDEX], minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


def _columns(
    reading: _Reading, padding: int, num_modalities: int, allocate: Allocate, frozen_prefix: bool
) -> tuple[dict[str, np.ndarray], list[int]]:
    """The arrays of ROW_DTYPES, modality-major, and the number of rows of each slice."""
    text = MODALITY_NAMES.index(TEXT.name)
    spans = [*reading.spans, _Span(padding, text, PADDING_DOC_ID, -1, 0, 0)]
    counts, modalities, doc_ids, segment_ids, orders, positions = np.array(spans, np.int64).T
    tokens = np.concatenate([*reading.tokens, np.full(padding, IGNORE_INDEX)])
    total = len(tokens)
    labels = _labels(tokens, reading.lengths)
    of_rows = np.repeat(modalities.astype(np.int8), counts)
    inside = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)  # a row's place in its span
    inside[total - padding :] = 0
    in_reading_order = {
        "token_ids": np.where(tokens == IGNORE_INDEX, 0, tokens),
        "labels": labels,
        "label_modality_ids": np.where(labels == IGNORE_INDEX, of_rows, np.roll(of_rows, -1)),
        "doc_ids": np.repeat(doc_ids, counts),
        "order_ids": np.repeat(orders, counts) + inside,
        "segment_ids": np.repeat(segment_ids, counts),
        "position_ids": np.repeat(positions, counts) + inside,
        "row_keys": np.concatenate([*reading.keys, np.zeros(padding, np.int64)]),
    }
    slices = np.where(_is_prefix(modalities, doc_ids), 0, modalities + 1) if frozen_prefix else modalities
    rows = np.argsort(np.repeat(slices.astype(np.uint8), counts), kind="stable")
    columns = {name: _stored([in_reading_order[name][rows]], total, allocate, np.dtype(dtype)) for name, dtype in ROW_DTYPES.items()}
    return columns, np.bincount(slices, counts, num_modalities + frozen_prefix).astype(int).tolist()


def _is_prefix(modalities: np.ndarray, doc_ids: np.ndarray) -> np.ndarray:
    """Which spans are text that nothing but text of their document comes before; padding is. Spans are in reading order."""
    is_other = modalities != TEXT.id
    others_before = np.cumsum(is_other) - is_other
    heads = np.flatnonzero(np.concatenate([[True], doc_ids[1:] != doc_ids[:-1]]))
    before_document = np.repeat(others_before[heads], np.diff(heads, append=len(doc_ids)))
    return ~is_other & (others_before == before_document)


def _labels(tokens: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """The next token of each place where both it and the next one are ids of one document; IGNORE_INDEX elsewhere. lengths: of the documents."""
    labels = np.append(tokens[1:], IGNORE_INDEX)[: len(tokens)]
    labels[tokens == IGNORE_INDEX] = IGNORE_INDEX
    ends = np.cumsum(lengths, dtype=np.int64)
    labels[ends[ends > 0] - 1] = IGNORE_INDEX
    return labels


def patch_dim(data: DataConfig) -> int:
    return data.image.channels * data.image.patch_size**2


def _width(dtypes: Iterable[str]) -> int:
    return sum(np.dtype(dtype).itemsize for dtype in dtypes)


def _stored(parts: Sequence[np.ndarray], length: int, allocate: Allocate, dtype: np.dtype) -> np.ndarray:
    """The parts in a row, in memory from `allocate`."""
    array = allocate((length, *parts[0].shape[1:]), dtype)
    return np.concatenate(parts, out=array, casting="same_kind")


def _payload(images: Sequence[tuple[Segment, tuple[int, int]]], width: int, allocate: Allocate) -> dict[str, np.ndarray]:
    segments, keys = [segment for segment, _ in images], [key for _, key in images]
    counts = np.array([s.num_tokens for s in segments], dtype=np.int64)
    # A float64 draw just below 1 would round to 1, which no noise level may be.
    draws = [min(keyed_uniform(*key, 0), LARGEST_BELOW_ONE) for key in keys]
    of_images = {
        "timesteps": draws,
        "max_timesteps": [s.max_timestep for s in segments],
        "noise_keys": [hash_key(*key, 1) for key in keys],
        "is_target": [s.is_target for s in segments],
    }
    total = int(counts.sum())
    values = allocate((total, width), np.dtype(np.float32))
    for segment, last in zip(segments, np.cumsum(counts).tolist(), strict=True):
        assert segment.values is not None
        normalized(segment.values, values[last - segment.num_tokens : last])
    arrays = {"values": values, "image_ids": _stored([np.repeat(np.arange(len(segments)), counts)], total, allocate, np.dtype(np.int64))}
    for name, dtype in IMAGE_DTYPES.items():
        arrays[name] = allocate((len(segments),), np.dtype(dtype))
        arrays[name][...] = of_images[name]
    return arrays
