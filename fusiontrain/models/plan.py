"""What a model declares about itself, as plain data, for `parallel/` to interpret."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelPlan:
    """How a model wants to be spread and frozen.

    shard_units: names of the modules that are gathered and freed as one, in forward order.
    recompute: names of the methods whose activations may be recomputed in the backward, module and method, in forward order.
    frozen: names of the parameters that never change.
    forward_methods: methods besides `forward` that run the shard units (an engine must gather weights for them too).
    """

    shard_units: tuple[str, ...]
    recompute: tuple[str, ...]
    frozen: tuple[str, ...]
    forward_methods: tuple[str, ...]
