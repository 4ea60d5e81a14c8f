"""Batches for tests: text written out by hand, and random layouts of documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import Part, batch_of, document
from fusiontrain.types import Batch, Document


def text_batch(token_ids: Sequence[int]) -> Batch:
    """One document of text alone, in one sequence of 96 tokens."""
    return batch_of([document(token_ids)], tiny_config())


def random_documents(seed: int, count: int, patch_dim: int = 48, vocab_size: int = 256) -> list[Document]:
    """`count` documents of one to four parts each: short texts and images of one to six patches, in any order."""
    random = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        parts: list[Part] = []
        for _ in range(random.integers(1, 5)):
            if random.random() < 0.5:
                parts.append(random.integers(0, vocab_size, size=random.integers(1, 9)).tolist())
            else:
                parts.append(("image", int(random.integers(1, 3)), int(random.integers(1, 4))))
        documents.append(document(*parts, patch_dim=patch_dim, seed=seed * 1000 + number))
    return documents
