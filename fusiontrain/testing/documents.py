"""Documents written out by hand: token ids and noise pictures, packed into a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusiontrain.config.schema import Config
from fusiontrain.data.collate import pack_documents
from fusiontrain.modality import IMAGE, TEXT
from fusiontrain.types import Batch, Document, Segment, SourceRef

Part = Sequence[int] | tuple[str | int, ...]
"""Token ids, or ("image", rows, columns), or the ids of other tokens: ("codes", 260, 261, ...) of an image, ("speech", 300, ...)."""


def document(*parts: Part, patch_dim: int = 48, seed: int = 0, is_target: bool = True, max_timestep: float = 1.0) -> Document:
    """A document of the given parts in reading order. Image patches are normal noise of `patch_dim` numbers, keyed by (seed, place)."""
    segments = []
    for place, part in enumerate(parts):
        if len(part) == 3 and part[0] == IMAGE.name:
            rows, columns = int(part[1]), int(part[2])
            values = np.random.default_rng((seed, place)).normal(size=(rows * columns, patch_dim)).astype(np.float32)
            segments.append(
                Segment(IMAGE.name, values=values, grid=(rows, columns), bidirectional=True, is_target=is_target, max_timestep=max_timestep)
            )
        elif isinstance(part[0] if len(part) else 0, str):
            name = IMAGE.name if part[0] == "codes" else str(part[0])
            segments.append(Segment(name, token_ids=np.asarray(part[1:], dtype=np.int64)))
        else:
            segments.append(Segment(TEXT.name, token_ids=np.asarray(part, dtype=np.int64)))
    return Document(tuple(segments), SourceRef("test", "memory", seed, f"document-{seed}"))


def batch_of(documents: Sequence[Document], config: Config, num_sequences: int | None = None) -> Batch:
    """The documents as one micro-batch of `config.data.sequence_length` tokens a sequence."""
    return pack_documents(documents, config, num_sequences)
