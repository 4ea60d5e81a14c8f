"""Activation checkpointing: forget a block's activations in the forward, compute them again in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

WRAPPER_PREFIXES = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What activation checkpointing and torch.compile put into parameter names."""

KEPT_BY_SELECTIVE = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "fusiontrain::modality_gemm", "fusiontrain::segments_gemm",
    "fusiontrain::grouped_gemm", "fusiontrain::modality_swiglu", "fusiontrain::masked_routing_attention", "fusiontrain::chunked_attention",
)  # fmt: skip
"""Beginnings of the names of operators whose results are dear to compute: products and attention. Norms, rotations and activations are not."""


def recompute_activations(model: nn.Module, names: Sequence[str], mode: str, every: int) -> None:
    """Let every `every`-th of the named methods of `model` forget its activations, in place; names of parameters stay as they are.

    mode: "none"; "full" keeps a method's inputs alone; "selective" also the results of `KEPT_BY_SELECTIVE`, so no product is computed twice.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    # The model draws nothing from global generators (noise is keyed), so there is no generator state to replay.
    options["preserve_rng_state"] = False
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for name in names[::every]:
        parent, _, method = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, method, partial(checkpoint, getattr(module, method), **options))


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = isinstance(operator, torch._ops.OpOverload) and operator._schema.name.startswith(KEPT_BY_SELECTIVE)
    # Into a buffer that is given: keeping the result would not fill it again.
    return CheckpointPolicy.MUST_SAVE if kept and not operator._schema.is_mutable else CheckpointPolicy.PREFER_RECOMPUTE


def clean_name(name: str) -> str:
    """A parameter name as the model itself spells it, without what wrappers add."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
