"""Batches that attention is tested on: who sees whom, by document and segment; the ranges are those of the data package."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fusiontrain.data.ranges import mask_ranges

Part = tuple[int, int]
"""(slice, number of tokens). Text is in slice 0 and causal; a part in any other slice is an image, whose tokens see one another."""


class Layout(NamedTuple):
    """allowed [T, T] bool is the truth, (query, key); key_ranges and query_ranges [T, G, 2] int32 are under test too."""

    allowed: torch.Tensor
    key_ranges: torch.Tensor
    query_ranges: torch.Tensor

    def __len__(self) -> int:
        return len(self.allowed)


def layout(documents: Sequence[Sequence[Part]], num_slices: int = 2, padding: Sequence[int] = (), blind: bool = True) -> Layout:
    """Documents in modality-major order; `padding` rows at the end of each slice, which see nothing if `blind`, else themselves."""
    tokens = []  # slice, document, order, segment
    for document, parts in enumerate(documents):
        order = 0
        for part, (where, length) in enumerate(parts):
            segment = -1 if where == 0 else 100 * document + part
            tokens += [(where, document, order + i, segment) for i in range(length)]
            order += length
    tokens += [(where, len(documents) + 9, i, -1) for where, count in enumerate(padding) for i in range(count)]
    tokens.sort(key=lambda token: token[:3])
    slices, docs, orders, segments = torch.tensor(tokens, dtype=torch.int64).reshape(-1, 4).unbind(1)
    is_padding = docs == len(documents) + 9
    allowed = (docs[:, None] == docs) & ((orders <= orders[:, None]) | ((segments[:, None] == segments) & (segments >= 0)))
    allowed[is_padding] = torch.eye(len(docs), dtype=torch.bool)[is_padding] & (not blind)
    bounds = tuple(int((slices < g).sum()) for g in range(num_slices + 1))
    ids = (torch.where(is_padding, -1, docs), torch.where(is_padding, 0, orders), segments)
    ranges = [torch.from_numpy(array) for array in mask_ranges(*(tensor.numpy() for tensor in ids), bounds)]
    if blind:
        for array in ranges:
            array[is_padding] = array[is_padding][..., 1:]
    return Layout(allowed, *ranges)


def ranges_of(allowed: torch.Tensor) -> torch.Tensor:
    """As few intervals as hold what each row of `allowed` sees: [T, G, 2] int32, empty ones behind."""
    edges = torch.nn.functional.pad(allowed.int(), (1, 1)).diff()
    runs = [list(zip((row == 1).nonzero().flatten().tolist(), (row == -1).nonzero().flatten().tolist(), strict=True)) for row in edges]
    width = max(map(len, runs))
    return torch.tensor([found + [(0, 0)] * (width - len(found)) for found in runs], dtype=torch.int32)


def random_layout(seed: int, num_slices: int = 3) -> Layout:
    """A few documents of a few parts each, with padding in any slice."""
    draw = random.Random(seed)
    documents = [
        [(draw.choice([0, draw.randrange(num_slices)]), draw.randint(1, 24)) for _ in range(draw.randint(1, 3))] for _ in range(draw.randint(1, 4))
    ]
    return layout(documents, num_slices, [draw.choice([0, draw.randint(0, 9)]) for _ in range(num_slices)], blind=draw.random() < 0.7)


LAYOUTS: dict[str, Layout] = {
    "one token": layout([[(0, 1)]], 1),
    "one modality": layout([[(0, 20)], [(0, 1)], [(0, 26)]], 1),
    "empty modality": layout([[(0, 37)], [(0, 4)]]),
    "no text": layout([[(1, 33)], [(1, 9)]]),
    "below a tile": layout([[(0, 3), (1, 4)]]),
    "ragged": layout([[(0, 13), (1, 30), (0, 7)], [(0, 5), (1, 18)]]),
    "whole tiles": layout([[(0, 32), (1, 64)]]),
    "image first and last": layout([[(1, 20), (0, 17), (1, 20)]]),
    "adjacent images": layout([[(0, 5), (1, 16), (1, 17), (0, 4)]]),
    "three, the middle empty": layout([[(0, 10), (2, 20), (0, 8)], [(2, 9), (0, 11)]], 3),
    "three": layout([[(0, 9), (1, 21), (2, 21), (0, 6)], [(0, 3), (2, 4)]], 3),
    "short documents": layout([[(0, 3), (1, 2)]] * 12),
    "blind padding": layout([[(0, 11), (1, 14)]], padding=(40, 5)),
    "padding that sees itself": layout([[(0, 11), (1, 14)]], padding=(7, 5), blind=False),
    "blind rows only": layout([], 2, padding=(5, 2)),
}


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: softmax over the allowed keys, dense -> out [T, H, Dh], lse [H, T], both float64; zeros and -inf for rows that see nothing."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    weights = torch.einsum("qhd,khd->hqk", q, k).mul(scale).exp() * allowed
    sums = weights.sum(-1)
    return torch.einsum("hqk,khd->qhd", weights / sums.where(sums > 0, 1)[..., None], v), sums.where(sums > 0, 1).log().where(sums > 0, -torch.inf)


def inputs(num_rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v that require gradients, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(num_rows, h, dim, generator=generator, dtype=torch.float64).to(dtype) for h in (heads, kv_heads, kv_heads, heads))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]
