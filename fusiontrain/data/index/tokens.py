"""Token ids of a shard's texts beside its index: tokenised once, counted by the plan and read by training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusiontrain.data.errors import BadSample
from fusiontrain.data.storage.files import ShardFile


@dataclass(frozen=True)
class TokenCache:
    """The tokens of n samples with p pieces. The ids stay in the file `path`: from byte `offset` on, as `dtype` (uint16 or uint32).

    counts [p] int32: tokens of texts, 0 for images       start [n + 1] int64: first id of a sample
    """

    path: Path
    offset: int
    dtype: np.dtype
    counts: np.ndarray
    start: np.ndarray

    def read(self, file: ShardFile, sample: int) -> np.ndarray:
        """The ids of all texts of a sample in a row, from the open file. Raises BadSample where they cannot be read."""
        first, last = int(self.start[sample]), int(self.start[sample + 1])
        width = self.dtype.itemsize
        try:
            return np.frombuffer(file.read(self.offset + first * width, (last - first) * width), self.dtype)
        except OSError as error:
            raise BadSample(f"its token ids cannot be read from {self.path} ({error})") from error


def ids_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def counts_digest(counts: np.ndarray) -> str:
    """A hash of the numbers of tokens, on which the plan depends; the ids follow from the texts and the tokenizer."""
    return hashlib.sha256(counts.tobytes()).hexdigest()[:32]
