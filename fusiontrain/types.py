"""The types that packages meet in. `data` makes a `Batch`, `models` consumes it; they never see each other.

Legend of dims, used in every shape comment:
    T tokens of a micro-batch     D model width        H query heads     K key/value heads     Dh head width
    F feed-forward width          V vocabulary         M modalities      G slices of the batch
    N continuous tokens (image patches)                C numbers per continuous token           I images

Modality-major layout: the T tokens lie as `[all text tokens | all image tokens]`, and speech behind them where data have it; where text is
frozen as `[text that no image of its document comes before | other text | all image tokens]`; inside a slice, documents and tokens keep their
reading order. Where a token stands in its document is metadata (`doc_ids`, `order_ids`, `position_ids`), never storage.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # data workers use the numpy types below and must not pay for importing torch
    import numpy as np
    import torch

IGNORE_INDEX = -100
"""Label of a position that carries no next-token loss."""

PADDING_DOC_ID = -1
"""`doc_ids` of padding. A padding row attends to itself alone, so no query has an empty set of keys."""


@dataclass(frozen=True)
class SourceRef:
    """Where a sample came from, carried to every error: source name, shard path, position in the shard, sample key."""

    source: str
    shard: str
    index: int
    key: str

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.index} ({self.key!r})"


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one modality inside a document (numpy, CPU).

    Discrete (text, speech, codes of images): `token_ids` [n] int64. Continuous (image): `values` [n, C], patches in raster order, with `grid` =
    (rows, columns), rows * columns = n; float32, or pixels as uint8 0 to 255, which become float32 -1 to 1 in a batch.
    bidirectional: tokens of the segment see each other regardless of order (image patches).
    is_target: the segment carries its modality's loss.
    max_timestep: largest noise level in [0, 1] that training may draw for it; 0 keeps it clean.
    """

    modality: str
    token_ids: np.ndarray | None = None
    values: np.ndarray | None = None
    grid: tuple[int, int] | None = None
    bidirectional: bool = False
    is_target: bool = True
    max_timestep: float = 1.0

    @property
    def num_tokens(self) -> int:
        array = self.token_ids if self.token_ids is not None else self.values
        return 0 if array is None else len(array)


@dataclass(frozen=True)
class Document:
    """Segments in reading order, begin- and end-of-image tokens already in the text segments around each image."""

    segments: tuple[Segment, ...]
    source: SourceRef

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)


@dataclass(frozen=True)
class PackedSequence:
    """Documents that share one token budget.

    noise_key: names this sequence in the whole run (a hash of seed and its place in the global order of sequences); every
    random draw of its images is keyed by (noise_key, image number in the sequence).
    """

    documents: tuple[Document, ...]
    length: int
    noise_key: int

    @property
    def num_tokens(self) -> int:
        return sum(document.num_tokens for document in self.documents)


@dataclass(frozen=True)
class Payload:
    """The continuous tokens of one modality, in the order of its slice.

    values        [N, C] float32   clean patches (pixels in [-1, 1], or latents), raster order inside an image
    image_ids     [N] int64        which of the I images a token belongs to; non-decreasing
    timesteps     [I] float32      uniform draw in [0, 1), keyed by (run seed, step, image); an objective maps it to a noise level
    max_timesteps [I] float32      cap of that noise level; 0 = the image is fed clean
    noise_keys    [I] int64        key of the noise of each image
    is_target     [I] bool         whether the image carries a loss
    grids         ((rows, columns), ...) of the I images, host numbers
    """

    values: torch.Tensor
    image_ids: torch.Tensor
    timesteps: torch.Tensor
    max_timesteps: torch.Tensor
    noise_keys: torch.Tensor
    is_target: torch.Tensor
    grids: tuple[tuple[int, int], ...]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Payload:
        return _to_device(self, device, non_blocking)


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch: T tokens in modality-major order, and everything the model needs to know about them.

    token_ids        [T] int64       0 on continuous tokens
    labels           [T] int64       next token in reading order, IGNORE_INDEX where there is none
    label_modality_ids [T] int8      modality of the label, the row's own where there is none
    loss_weights     [T] float32     weight of each label
    modality_offsets [M + 1] int32   first row of each modality; `modality_bounds` are the same numbers on the host
    slice_offsets    [G + 1] int32   first row of each slice; a modality is one or more neighbouring slices; `slice_bounds` on the host
    doc_ids          [T] int32       PADDING_DOC_ID on padding
    order_ids        [T] int32       place in the document's reading order
    segment_ids      [T] int32       >= 0: bidirectional span (unique in the batch); -1: causal
    position_ids     [T] int32       rotary position
    row_keys         [T] int64       keys of the noise of each row (dropout), by its sequence and place there
    key_ranges       [T, G, 2] int32 the keys [lo, hi) of each slice that a query may see (absolute rows)
    query_ranges     [T, G, 2] int32 the transpose: the queries [lo, hi) of each slice that may see a key
    num_prefix_rows  rows of the first slice where it holds, besides padding, the text that no image of its document comes before; they see one
                     another alone. 0 where such text is not told apart; host number
    num_prefix_labels  labelled rows among them; host number
    payloads         by modality name, for continuous modalities (present also when empty)
    target_counts    by modality name: labels of that modality, or target images where those are continuous; host numbers
    token_counts     by modality name: tokens without padding; host numbers
    sources          of the documents, in order of doc id
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    label_modality_ids: torch.Tensor
    loss_weights: torch.Tensor
    modality_offsets: torch.Tensor
    modality_bounds: tuple[int, ...]
    slice_offsets: torch.Tensor
    slice_bounds: tuple[int, ...]
    doc_ids: torch.Tensor
    order_ids: torch.Tensor
    segment_ids: torch.Tensor
    position_ids: torch.Tensor
    row_keys: torch.Tensor
    key_ranges: torch.Tensor
    query_ranges: torch.Tensor
    num_prefix_rows: int
    num_prefix_labels: int
    payloads: dict[str, Payload]
    target_counts: dict[str, int]
    token_counts: dict[str, int]
    sources: tuple[SourceRef, ...]

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.modality_bounds[-1]

    @property
    def discrete(self) -> tuple[str, ...]:
        """Names of the modalities whose tokens are ids."""
        return tuple(name for name in self.target_counts if name not in self.payloads)

    @property
    def has_prefix_slice(self) -> bool:
        """Whether text that no image comes before is told apart, be there any or not."""
        return len(self.slice_bounds) > len(self.modality_bounds)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return _to_device(self, device, non_blocking)


def _to_device(record: Any, device: torch.device | str, non_blocking: bool) -> Any:
    """A copy of a dataclass with every tensor (also inside dicts of dataclasses) on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        return value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value

    return dataclasses.replace(
        record, **{field.name: move(getattr(record, field.name)) for field in dataclasses.fields(record)}
    )


@dataclass(frozen=True)
class LossTerm:
    """A loss that is not yet divided: `sum` is a float32 scalar with gradient, `count` an int64 scalar.

    The trainer divides by the count over all ranks and micro-batches of the step, so splitting a batch changes nothing.
    parts [n] float32 and rows [n] int64, to look at and without gradient: what each of n rows of the batch adds to `sum`.
    """

    sum: torch.Tensor
    count: torch.Tensor
    parts: torch.Tensor | None = None
    rows: torch.Tensor | None = None
