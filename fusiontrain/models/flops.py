"""Exact FLOPs of a training step, from the model and the batch: what is computed, no more.

A multiply-add is two FLOPs. Counted are matrix products and convolutions: each costs one product forward, one more where the gradient
of its input is needed and one more where its weight trains. Attention is counted on the pairs the mask allows, the LM head on labelled
rows, nothing on padding. The frozen prefix has a forward and no backward, and its keys and values get no gradients.
The usual 6ND would bill frozen weights for gradients and image patches for the LM head.
"""

from __future__ import annotations

import torch

from fusiontrain.modality import IMAGE, TEXT, table_of
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.layers.size import num_products
from fusiontrain.models.layers.untied import UntiedLinear
from fusiontrain.types import PADDING_DOC_ID, Batch


def count_flops(model: FusionModel, batch: Batch) -> dict[str, int]:
    """FLOPs of one forward and backward over `batch` (on the CPU), by modality of the rows, and `attention` for the softmax part."""
    trains = any(parameter.requires_grad for parameter in model.parameters())
    flops = {modality.name: batch.token_counts[modality.name] * _flops_per_row(model, modality.id, trains) for modality in table_of(batch.token_counts)}
    head = model.shape.vocab_size * model.shape.dim
    for name in batch.discrete:
        flops[name] += 2 * batch.target_counts[name] * head * (1 + trains + model.text.head_weight.requires_grad)
    prefix = model.num_forward_only(batch)
    if prefix and trains:  # text weights are frozen, so all its backward is gradients of inputs: one product each
        tokens = int((batch.doc_ids[:prefix] != PADDING_DOC_ID).sum())
        flops[TEXT.name] -= tokens * _flops_per_row(model, TEXT.id, False) + 2 * batch.num_prefix_labels * head
    if model.image is not None:
        for grid in batch.payloads[IMAGE.name].grids:
            first, others = model.image.macs_per_image(grid)
            flops[IMAGE.name] += 2 * (2 * first + 3 * others)
    # Scores and values; backward: gradients of probabilities and queries for a live query, of values and keys for a live key.
    products = 2 * allowed_pairs(batch)
    if trains:
        products += 2 * allowed_pairs(batch, prefix) + 2 * allowed_pairs(batch, prefix, prefix)
    flops["attention"] = 2 * products * model.shape.num_heads * model.shape.head_dim * model.shape.num_layers
    return flops


def recomputed_flops(model: FusionModel, batch: Batch, every: int = 1) -> int:
    """FLOPs of one more forward of every `every`-th block, from the first on, over the rows that have a backward: what checkpointing of whole
    blocks adds to `count_flops`. Selective checkpointing adds nothing: it keeps the products."""
    blocks = list(model.blocks)[::every]
    linears = [module for block in blocks for module in block.modules() if isinstance(module, UntiedLinear)]
    prefix = model.num_forward_only(batch)
    live = batch.token_counts | {TEXT.name: batch.token_counts[TEXT.name] - int((batch.doc_ids[:prefix] != PADDING_DOC_ID).sum())}
    products = sum(live[m.name] * sum(num_products(linear[linear.groups[m.id]]) for linear in linears) for m in table_of(live))
    scores = allowed_pairs(batch, prefix) * model.shape.num_heads * model.shape.head_dim * len(blocks)
    return 2 * (products + 2 * scores)


def allowed_pairs(batch: Batch, first_query: int = 0, first_key: int = 0) -> int:
    """Query-key pairs that the mask allows, of rows from the given ones on, padding left out."""
    low, high = batch.key_ranges[first_query:].clamp(min=first_key).unbind(-1)
    lengths = (high - low).sum(dim=1, dtype=torch.int64)
    return int(lengths[batch.doc_ids[first_query:] != PADDING_DOC_ID].sum())


def _flops_per_row(model: FusionModel, modality: int, trains: bool) -> int:
    """FLOPs of the blocks' projections for one row of a modality."""
    total = 0
    for module in model.blocks.modules():
        if isinstance(module, UntiedLinear):
            linear = module[module.groups[modality]]
            total += 2 * num_products(linear) * (1 + trains + linear.weight.requires_grad)
    return total
