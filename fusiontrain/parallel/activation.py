"""Activation checkpointing: forget a block's activations in the forward, compute them again in the backward."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

WRAPPER_PREFIXES = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What activation checkpointing and torch.compile put into parameter names."""


def recompute_activations(model: nn.Module, names: Iterable[str]) -> None:
    """Wrap the named modules of `model` in place. Their state_dict keys stay as they are; their parameter names do not."""
    for name in names:
        parent, _, child = name.rpartition(".")
        # The model draws nothing from global generators (noise is keyed), so there is no generator state to replay.
        wrapped = checkpoint_wrapper(model.get_submodule(name), checkpoint_impl=CheckpointImpl.NO_REENTRANT, preserve_rng_state=False)
        model.get_submodule(parent).register_module(child, wrapped)


def clean_name(name: str) -> str:
    """A parameter name as the model itself spells it, without what wrappers add."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
