"""Activation checkpointing: forget a block's activations in the forward, compute them again in the backward."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

WRAPPER_PREFIXES = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What activation checkpointing and torch.compile put into parameter names."""


def recompute_activations(model: nn.Module, names: Iterable[str]) -> None:
    """Let the named methods of modules of `model` forget their activations, in place; names of parameters stay as they are."""
    for name in names:
        parent, _, method = name.rpartition(".")
        module = model.get_submodule(parent)
        # The model draws nothing from global generators (noise is keyed), so there is no generator state to replay.
        setattr(module, method, partial(checkpoint, getattr(module, method), use_reentrant=False, preserve_rng_state=False))


def clean_name(name: str) -> str:
    """A parameter name as the model itself spells it, without what wrappers add."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
