"""torch.compile, one shard unit at a time: identical blocks then share one compilation."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def compile_units(model: nn.Module, names: Iterable[str]) -> None:
    """Compile the forward of the named modules of `model` in place; parameter names stay as they are."""
    for name in names:
        model.get_submodule(name).compile()
