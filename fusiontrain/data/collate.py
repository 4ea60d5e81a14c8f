"""Packed sequences to a `Batch`: sorted by modality once, with everything the model needs to know about where a token stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fusiontrain.config.schema import Config, DataConfig
from fusiontrain.data.packing import best_fit_decreasing
from fusiontrain.data.ranges import mask_ranges
from fusiontrain.modality import MODALITIES, MODALITY_NAMES, TEXT
from fusiontrain.types import IGNORE_INDEX, PADDING_DOC_ID, Batch, Document, PackedSequence, Payload, Segment
from fusiontrain.utils.keyed import hash_key, keyed_uniform

LARGEST_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
ROW_FIELDS = ("token_ids", "labels", "doc_ids", "order_ids", "segment_ids", "position_ids")
PADDING_ROW = {"token_ids": 0, "labels": IGNORE_INDEX, "doc_ids": PADDING_DOC_ID, "order_ids": 0, "segment_ids": -1, "position_ids": 0}


@dataclass
class _Rows:
    """The rows of one modality, as lists of arrays per segment, and its images."""

    columns: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in ROW_FIELDS})
    segments: list[Segment] = field(default_factory=list)
    noise_keys: list[tuple[int, int]] = field(default_factory=list)

    def column(self, name: str) -> np.ndarray:
        return np.concatenate(self.columns[name]) if self.columns[name] else np.zeros(0, np.int64)


def collate(sequences: Sequence[PackedSequence], data: DataConfig) -> Batch:
    """One micro-batch of `sum of sequence.length` rows, modality-major, padding at the end of the text slice.

    `data.document_mask` off: the documents of a sequence see each other as one (rotary positions still start anew in each).
    """
    rows = {name: _Rows() for name in MODALITY_NAMES}
    documents = [(sequence, document) for sequence in sequences for document in sequence.documents]
    counters = {"document": 0, "segment": 0}
    for sequence in sequences:
        _add_sequence(rows, sequence, counters, data.document_mask)
    total = sum(sequence.length for sequence in sequences)
    used = sum(sequence.num_tokens for sequence in sequences)
    for name, value in PADDING_ROW.items():
        rows[TEXT.name].columns[name].append(np.full(total - used, value, np.int64))
    sizes = [len(rows[name].column("doc_ids")) for name in MODALITY_NAMES]
    bounds = tuple(int(bound) for bound in np.concatenate([[0], np.cumsum(sizes)]))
    columns = {name: np.concatenate([rows[modality].column(name) for modality in MODALITY_NAMES]) for name in ROW_FIELDS}
    key_ranges, query_ranges = mask_ranges(columns["doc_ids"], columns["order_ids"], columns["segment_ids"], bounds)
    payloads = {m.name: _payload(rows[m.name], _patch_dim(data)) for m in MODALITIES if not m.discrete}
    offsets = torch.tensor(bounds, dtype=torch.int32)
    text_tokens = sizes[TEXT.id] - (total - used)
    return Batch(
        token_ids=torch.from_numpy(columns["token_ids"]),
        labels=torch.from_numpy(columns["labels"]),
        loss_weights=torch.ones(total, dtype=torch.float32),
        modality_offsets=offsets,
        modality_bounds=bounds,
        slice_offsets=offsets.clone(),
        slice_bounds=bounds,
        **{name: torch.from_numpy(columns[name].astype(np.int32)) for name in ("doc_ids", "order_ids", "segment_ids", "position_ids")},
        key_ranges=torch.from_numpy(key_ranges),
        query_ranges=torch.from_numpy(query_ranges),
        payloads=payloads,
        target_counts={
            TEXT.name: int((columns["labels"] != IGNORE_INDEX).sum()),
            **{name: int(payload.is_target.sum()) for name, payload in payloads.items()},
        },
        token_counts={name: text_tokens if name == TEXT.name else sizes[i] for i, name in enumerate(MODALITY_NAMES)},
        sources=tuple(document.source for _, document in documents),
    )


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


def _patch_dim(data: DataConfig) -> int:
    return data.image.channels * data.image.patch_size**2


def _payload(rows: _Rows, patch_dim: int) -> Payload:
    segments = rows.segments
    values = np.concatenate([s.values for s in segments]) if segments else np.zeros((0, patch_dim), np.float32)
    counts = np.array([s.num_tokens for s in segments], dtype=np.int64)
    # A float64 draw just below 1 would round to 1, which no noise level may be.
    draws = [min(keyed_uniform(*key, 0), LARGEST_BELOW_ONE) for key in rows.noise_keys]
    return Payload(
        values=torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)),
        image_ids=torch.from_numpy(np.repeat(np.arange(len(segments)), counts)),
        timesteps=torch.tensor(draws, dtype=torch.float32),
        max_timesteps=torch.tensor([s.max_timestep for s in segments], dtype=torch.float32),
        noise_keys=torch.tensor([hash_key(*key, 1) for key in rows.noise_keys], dtype=torch.int64),
        is_target=torch.tensor([s.is_target for s in segments], dtype=torch.bool),
        grids=tuple(s.grid for s in segments if s.grid is not None),
    )


def pack_documents(documents: Sequence[Document], config: Config, num_sequences: int | None = None) -> Batch:
    """Documents of one's own as a micro-batch: packed best fit decreasing into sequences of `data.sequence_length`.

    num_sequences: pad with empty sequences up to that number (default: as many as the packing needs, at least one). Raises ValueError for a
    document longer than a sequence and when the documents need more sequences than that.
    """
    length = config.data.sequence_length
    groups = best_fit_decreasing([document.num_tokens for document in documents], length)
    wanted = max(1, len(groups)) if num_sequences is None else num_sequences
    if len(groups) > wanted:
        raise ValueError(f"the documents fill {len(groups)} sequences of {length} tokens, num_sequences={wanted} were asked for")
    groups += [[]] * (wanted - len(groups))
    sequences = [
        PackedSequence(tuple(documents[i] for i in sorted(group)), length, hash_key(config.seed, number)) for number, group in enumerate(groups)
    ]
    return collate(sequences, config.data)
