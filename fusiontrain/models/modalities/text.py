"""Text in and out: the embedding table and the LM head of a Llama."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class TextModality(nn.Module):
    """`head_weight` is [V, D]; with tied embeddings it is the table itself."""

    def __init__(self, vocab_size: int, dim: int, tie_embeddings: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.head = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def encode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [...] int64 -> [..., D]."""
        return self.embedding(token_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., D], normalised -> [..., V]."""
        return F.linear(hidden, self.head_weight)
