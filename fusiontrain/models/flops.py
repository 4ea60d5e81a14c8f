"""Exact FLOPs of a training step, from the model and the batch: what is computed, no more.

A multiply-add is two FLOPs. Counted are matrix products and convolutions: each costs one product forward, one more where the gradient
of its input is needed and one more where its weight trains. Attention is counted on the pairs the mask allows, the LM head on labelled
rows, nothing on padding. The frozen prefix has a forward and no backward, and its keys and values get no gradients. What activation
checkpointing computes again is counted apart (`recomputed_by_part`): with it they are the FLOPs of the hardware, without it of the model.
The usual 6ND would bill frozen weights for gradients and image patches for the LM head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from fusiontrain.modality import IMAGE, TEXT, table_of
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.layers.block import Block
from fusiontrain.models.layers.size import num_products
from fusiontrain.models.layers.untied import UntiedLinear
from fusiontrain.types import PADDING_DOC_ID, Batch

PROJECTIONS, ATTENTION, FEED_FORWARD, HEAD, PATCHER = "attention projections", "attention", "feed-forward", "LM head and loss", "patcher"


class Part(NamedTuple):
    """A group of modules, and the modality of the rows that it computes (of attention: of the queries)."""

    group: str
    modality: str


@dataclass(frozen=True)
class Flops:
    """Of one forward and of the backward that follows it."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


def count_flops(model: FusionModel, batch: Batch) -> dict[str, int]:
    """FLOPs of one forward and backward over `batch` (on the CPU), by modality of the rows, and `attention` for the softmax part."""
    found = dict.fromkeys((*(modality.name for modality in table_of(batch.token_counts)), ATTENTION), 0)
    for part, flops in flops_by_part(model, batch).items():
        found[ATTENTION if part.group == ATTENTION else part.modality] += flops.total
    return found


def flops_by_part(model: FusionModel, batch: Batch) -> dict[Part, Flops]:
    """FLOPs of one forward and backward over `batch` (on the CPU); parts that compute nothing are left out."""
    trains = any(parameter.requires_grad for parameter in model.parameters())
    live = _live_tokens(model, batch)
    found: dict[Part, Flops] = {}
    for group, layers in _linears(model.blocks).items():
        for modality in table_of(batch.token_counts):
            sizes = [(num_products(linear), linear.weight.requires_grad) for linear in _of_modality(layers, modality.id)]
            forward = batch.token_counts[modality.name] * sum(size for size, _ in sizes)
            backward = live[modality.name] * sum(size * (1 + trained) for size, trained in sizes)
            found[Part(group, modality.name)] = Flops(2 * forward, 2 * backward * trains)
    for name in batch.discrete:
        found[Part(HEAD, name)] = _head(model, batch, name, trains)
    if model.image is not None:
        found[Part(PATCHER, IMAGE.name)] = _patcher(model, batch, trains)
    for modality in table_of(batch.token_counts):
        found[Part(ATTENTION, modality.name)] = _attention(model, batch, modality.id, trains)
    return {part: flops for part, flops in found.items() if flops.total}


def recomputed_by_part(model: FusionModel, batch: Batch, every: int = 1) -> dict[Part, int]:
    """FLOPs of one more forward of every `every`-th block, from the first on, over the rows that have a backward: what checkpointing of whole
    blocks adds to `flops_by_part`. Selective checkpointing adds nothing: it keeps the products."""
    blocks = list(model.blocks)[::every]
    live, prefix = _live_tokens(model, batch), model.num_forward_only(batch)
    found = {
        Part(group, modality.name): 2 * live[modality.name] * sum(map(num_products, _of_modality(layers, modality.id)))
        for group, layers in _linears(blocks).items()
        for modality in table_of(batch.token_counts)
    }
    for modality in table_of(batch.token_counts):
        pairs = allowed_pairs(batch, *_rows(batch, modality.id, prefix))
        found[Part(ATTENTION, modality.name)] = 2 * 2 * pairs * model.shape.num_heads * model.shape.head_dim * len(blocks)
    return {part: flops for part, flops in found.items() if flops}


def recomputed_flops(model: FusionModel, batch: Batch, every: int = 1) -> int:
    """The sum of `recomputed_by_part`."""
    return sum(recomputed_by_part(model, batch, every).values())


def six_nd(model: FusionModel, batch: Batch) -> int:
    """What papers would bill (Kaplan et al., arXiv 2001.08361; Transfusion 4.2): six FLOPs for every weight that a token passes and every token.

    N: the blocks' products for one row of its modality, and the LM head; for text and image tokens alike, frozen or not, without attention,
    patcher and what is left out.
    """
    head = model.shape.vocab_size * model.shape.dim
    layers = [layer for group in _linears(model.blocks).values() for layer in group]
    weights = {m.name: head + sum(map(num_products, _of_modality(layers, m.id))) for m in table_of(batch.token_counts)}
    return 6 * sum(weights[name] * tokens for name, tokens in batch.token_counts.items())


def allowed_pairs(batch: Batch, first_query: int = 0, end_query: int | None = None, first_key: int = 0) -> int:
    """Query-key pairs that the mask allows, of the rows in the given bounds, padding left out."""
    queries = slice(first_query, end_query)
    low, high = batch.key_ranges[queries].clamp(min=first_key).unbind(-1)
    lengths = (high - low).sum(dim=1, dtype=torch.int64)
    return int(lengths[batch.doc_ids[queries] != PADDING_DOC_ID].sum())


def _head(model: FusionModel, batch: Batch, modality: str, trains: bool) -> Flops:
    """Labelled rows alone; those of the frozen prefix have a loss to log and no backward."""
    labels = batch.target_counts[modality]
    fixed = batch.num_prefix_labels if modality == TEXT.name and model.num_forward_only(batch) else 0
    product = 2 * model.shape.vocab_size * model.shape.dim
    return Flops(labels * product, (labels - fixed) * product * (trains + model.text.head_weight.requires_grad))


def _patcher(model: FusionModel, batch: Batch, trains: bool) -> Flops:
    assert model.image is not None
    sizes = [model.image.macs_per_image(grid) for grid in batch.payloads[IMAGE.name].grids]
    first, others = (sum(size) for size in zip(*sizes, strict=True)) if sizes else (0, 0)
    return Flops(2 * (first + others), 2 * (first + 2 * others) * trains)


def _attention(model: FusionModel, batch: Batch, modality: int, trains: bool) -> Flops:
    """Scores and values; backward: gradients of probabilities and queries for a live query, of values and keys for a live key."""
    prefix = model.num_forward_only(batch)
    forward = 2 * allowed_pairs(batch, *_rows(batch, modality))
    live = _rows(batch, modality, prefix)
    backward = 2 * allowed_pairs(batch, *live) + 2 * allowed_pairs(batch, *live, first_key=prefix) if trains else 0
    product = 2 * model.shape.num_heads * model.shape.head_dim * model.shape.num_layers
    return Flops(forward * product, backward * product)


def _rows(batch: Batch, modality: int, first: int = 0) -> tuple[int, int]:
    """First and end row of a modality among the rows from `first` on."""
    low, high = batch.modality_bounds[modality], batch.modality_bounds[modality + 1]
    return max(low, first), max(high, first)


def _live_tokens(model: FusionModel, batch: Batch) -> dict[str, int]:
    """Tokens that have a backward, by modality: all but the frozen prefix, which is text."""
    prefix = model.num_forward_only(batch)
    fixed = int((batch.doc_ids[:prefix] != PADDING_DOC_ID).sum())
    return batch.token_counts | {TEXT.name: batch.token_counts[TEXT.name] - fixed}


def _linears(blocks: Iterable[nn.Module]) -> dict[str, list[UntiedLinear]]:
    """The projections of blocks by group."""
    found: dict[str, list[UntiedLinear]] = {PROJECTIONS: [], FEED_FORWARD: []}
    for block in blocks:
        assert isinstance(block, Block)
        for group, module in ((PROJECTIONS, block.attention), (FEED_FORWARD, block.feed_forward)):
            found[group] += [child for child in module.children() if isinstance(child, UntiedLinear)]
    return found


def _of_modality(layers: Iterable[UntiedLinear], modality: int) -> list[nn.Linear]:
    """The member of each that rows of a modality go through."""
    return [layer[layer.groups[modality]] for layer in layers]
