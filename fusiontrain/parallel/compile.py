"""torch.compile, one shard unit at a time: identical blocks then share one compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.fx.experimental import _config as symbolic_shapes


def compile_units(model: nn.Module, names: Iterable[str], any_number_of_rows: bool, backend: str | Callable = "inductor") -> None:
    """Compile the forward of the named modules of `model` in place; parameter names stay as they are.

    A micro-batch has the same number of rows every step, and how modalities share them is data to the operators: one compilation. But a frozen
    prefix is a tensor of its own, whose rows every batch counts anew. any_number_of_rows: compile once for all counts, none and one included
    (by default torch compiles those again), and whatever other size a count happens to equal. These are settings of the whole process.
    """
    if any_number_of_rows:
        symbolic_shapes.backed_size_oblivious = True
        symbolic_shapes.use_duck_shape = False
    for name in names:
        model.get_submodule(name).compile(dynamic=True if any_number_of_rows else None, backend=backend)
