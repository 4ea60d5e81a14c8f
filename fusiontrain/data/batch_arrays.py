"""Packed sequences to the arrays of a `Batch`: sorted by modality once, with everything the model needs to know about where a token stood.

In numpy alone, so that worker processes need no torch; `collate.py` makes the tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fusiontrain.config.schema import DataConfig
from fusiontrain.data.arena import ALIGNMENT, Allocate
from fusiontrain.data.ranges import mask_ranges
from fusiontrain.modality import IMAGE, MODALITIES, MODALITY_NAMES, TEXT
from fusiontrain.types import IGNORE_INDEX, PADDING_DOC_ID, Document, PackedSequence, Segment, SourceRef
from fusiontrain.utils.keyed import hash_key, keyed_uniform

LARGEST_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
ROW_DTYPES = {"token_ids": "i8", "labels": "i8", "doc_ids": "i4", "order_ids": "i4", "segment_ids": "i4", "position_ids": "i4"}
IMAGE_DTYPES = {"timesteps": "f4", "max_timesteps": "f4", "noise_keys": "i8", "is_target": "?"}
PADDING_ROW = {"token_ids": 0, "labels": IGNORE_INDEX, "doc_ids": PADDING_DOC_ID, "order_ids": 0, "segment_ids": -1, "position_ids": 0}


@dataclass(frozen=True)
class BatchArrays:
    """A `Batch` in numpy, with its names, shapes and dtypes.

    columns: every array with a row per token, by name. payloads: arrays of each continuous modality, by name.
    """

    columns: dict[str, np.ndarray]
    payloads: dict[str, dict[str, np.ndarray]]
    grids: dict[str, tuple[tuple[int, int], ...]]
    bounds: tuple[int, ...]
    target_counts: dict[str, int]
    token_counts: dict[str, int]
    sources: tuple[SourceRef, ...]


@dataclass
class _Rows:
    """The rows of one modality, as lists of arrays per segment, and its images."""

    columns: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in ROW_DTYPES})
    segments: list[Segment] = field(default_factory=list)
    noise_keys: list[tuple[int, int]] = field(default_factory=list)


def batch_arrays(sequences: Sequence[PackedSequence], data: DataConfig, allocate: Allocate = np.empty) -> BatchArrays:
    """One micro-batch of `sum of sequence.length` rows, modality-major, padding at the end of the text slice.

    allocate(shape, dtype): where the arrays go. `data.document_mask` off: the documents of a sequence see each other as one (rotary positions
    still start anew in each).
    """
    rows = {name: _Rows() for name in MODALITY_NAMES}
    counters = {"document": 0, "segment": 0}
    for sequence in sequences:
        _add_sequence(rows, sequence, counters, data.document_mask)
    total = sum(sequence.length for sequence in sequences)
    padding = total - sum(sequence.num_tokens for sequence in sequences)
    for name, value in PADDING_ROW.items():
        rows[TEXT.name].columns[name].append(np.full(padding, value, np.int64))
    columns = {
        name: _stored([part for modality in MODALITY_NAMES for part in rows[modality].columns[name]], total, allocate, np.dtype(dtype))
        for name, dtype in ROW_DTYPES.items()
    }
    sizes = [sum(map(len, rows[name].columns["doc_ids"])) for name in MODALITY_NAMES]
    bounds = (0, *itertools.accumulate(sizes))
    ranges = mask_ranges(columns["doc_ids"], columns["order_ids"], columns["segment_ids"], bounds)
    for name, found in zip(("key_ranges", "query_ranges"), ranges, strict=True):
        columns[name] = _stored([found], total, allocate, found.dtype)
    columns["loss_weights"] = _stored([np.ones(total, np.float32)], total, allocate, np.dtype(np.float32))
    payloads = {m.name: _payload(rows[m.name], patch_dim(data), allocate) for m in MODALITIES if not m.discrete}
    return BatchArrays(
        columns=columns,
        payloads=payloads,
        grids={name: tuple(s.grid for s in rows[name].segments if s.grid is not None) for name in payloads},
        bounds=bounds,
        target_counts={
            TEXT.name: int((columns["labels"] != IGNORE_INDEX).sum()),
            **{name: int(payload["is_target"].sum()) for name, payload in payloads.items()},
        },
        token_counts={name: size - (padding if name == TEXT.name else 0) for name, size in zip(MODALITY_NAMES, sizes, strict=True)},
        sources=tuple(document.source for sequence in sequences for document in sequence.documents),
    )


def most_bytes(num_sequences: int, data: DataConfig) -> int:
    """No micro-batch of that many sequences needs more: all tokens are patches, and every image is one patch between two markers."""
    slices = len(MODALITY_NAMES)
    row = _width([*ROW_DTYPES.values(), "f4"]) + 2 * _width(["i4", "i4"]) * slices  # with the weight and two intervals per slice
    patch = patch_dim(data) * _width(["f4"]) + _width(["i8"]) if IMAGE.name in data.modalities else 0
    images = _width(IMAGE_DTYPES.values()) / 3
    arrays = len(ROW_DTYPES) + 3 + (2 + len(IMAGE_DTYPES)) * (slices - 1)
    return math.ceil(num_sequences * data.sequence_length * (row + patch + images)) + arrays * ALIGNMENT


def _add_sequence(rows: dict[str, _Rows], sequence: PackedSequence, counters: dict[str, int], document_mask: bool) -> None:
    order, image_number = 0, 0
    for place, document in enumerate(sequence.documents):
        start = 0 if document_mask else order
        labels = _labels(document)
        position = 0
        for segment in document.segments:
            count = segment.num_tokens
            target = rows[segment.modality]
            positions = np.arange(position, position + count)
            columns = {
                "token_ids": segment.token_ids if segment.token_ids is not None else np.zeros(count, np.int64),
                "labels": labels[position : position + count],
                "doc_ids": np.full(count, counters["document"]),
                "order_ids": start + positions,
                "segment_ids": np.full(count, counters["segment"] if segment.bidirectional else -1),
                "position_ids": positions,
            }
            for name, values in columns.items():
                target.columns[name].append(np.asarray(values, np.int64))
            counters["segment"] += segment.bidirectional
            if segment.values is not None:
                target.segments.append(segment)
                target.noise_keys.append((sequence.noise_key, image_number))
                image_number += 1
            position += count
        order += position
        if document_mask or place == len(sequence.documents) - 1:
            counters["document"] += 1


def _labels(document: Document) -> np.ndarray:
    """The next token of each place of a document where both it and the next one are text; IGNORE_INDEX elsewhere."""
    tokens = np.concatenate(
        [s.token_ids if s.token_ids is not None else np.full(s.num_tokens, IGNORE_INDEX) for s in document.segments] or [np.zeros(0, np.int64)]
    )
    labels = np.append(tokens[1:], IGNORE_INDEX)[: len(tokens)]
    labels[tokens == IGNORE_INDEX] = IGNORE_INDEX
    return labels


def patch_dim(data: DataConfig) -> int:
    return data.image.channels * data.image.patch_size**2


def _width(dtypes: Iterable[str]) -> int:
    return sum(np.dtype(dtype).itemsize for dtype in dtypes)


def _stored(parts: Sequence[np.ndarray], length: int, allocate: Allocate, dtype: np.dtype) -> np.ndarray:
    """The parts in a row, in memory from `allocate`."""
    array = allocate((length, *parts[0].shape[1:]), dtype)
    return np.concatenate(parts, out=array, casting="same_kind")


def _payload(rows: _Rows, width: int, allocate: Allocate) -> dict[str, np.ndarray]:
    segments = rows.segments
    counts = np.array([s.num_tokens for s in segments], dtype=np.int64)
    # A float64 draw just below 1 would round to 1, which no noise level may be.
    draws = [min(keyed_uniform(*key, 0), LARGEST_BELOW_ONE) for key in rows.noise_keys]
    of_images = {
        "timesteps": draws,
        "max_timesteps": [s.max_timestep for s in segments],
        "noise_keys": [hash_key(*key, 1) for key in rows.noise_keys],
        "is_target": [s.is_target for s in segments],
    }
    values = [np.zeros((0, width), np.float32), *(s.values for s in segments if s.values is not None)]
    arrays = {
        "values": _stored(values, int(counts.sum()), allocate, np.dtype(np.float32)),
        "image_ids": _stored([np.repeat(np.arange(len(segments)), counts)], int(counts.sum()), allocate, np.dtype(np.int64)),
    }
    for name, dtype in IMAGE_DTYPES.items():
        arrays[name] = allocate((len(segments),), np.dtype(dtype))
        arrays[name][...] = of_images[name]
    return arrays
