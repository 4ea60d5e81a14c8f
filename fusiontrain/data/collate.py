"""The arrays of a micro-batch as the `Batch` that models take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusiontrain.config.schema import Config, DataConfig
from fusiontrain.config.validate import has_frozen_prefix
from fusiontrain.data.batch_arrays import BatchArrays, batch_arrays
from fusiontrain.data.plan.packing import best_fit_decreasing
from fusiontrain.types import Batch, Document, PackedSequence, Payload
from fusiontrain.utils.keyed import hash_key


def to_batch(arrays: BatchArrays) -> Batch:
    """The same numbers as tensors, which share the memory of the arrays."""
    return Batch(
        **{name: torch.from_numpy(column) for name, column in arrays.columns.items()},
        modality_offsets=torch.tensor(arrays.bounds, dtype=torch.int32),
        modality_bounds=arrays.bounds,
        slice_offsets=torch.tensor(arrays.slice_bounds, dtype=torch.int32),
        slice_bounds=arrays.slice_bounds,
        num_prefix_rows=arrays.num_prefix_rows,
        num_prefix_labels=arrays.num_prefix_labels,
        payloads={
            modality: Payload(**{name: torch.from_numpy(array) for name, array in payload.items()}, grids=arrays.grids[modality])
            for modality, payload in arrays.payloads.items()
        },
        target_counts=arrays.target_counts,
        token_counts=arrays.token_counts,
        sources=arrays.sources,
    )


def collate(sequences: Sequence[PackedSequence], data: DataConfig, frozen_prefix: bool = False) -> Batch:
    """One micro-batch of packed sequences; `batch_arrays` says how it is laid out."""
    return to_batch(batch_arrays(sequences, data, frozen_prefix=frozen_prefix))


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
    return collate(sequences, config.data, has_frozen_prefix(config))
