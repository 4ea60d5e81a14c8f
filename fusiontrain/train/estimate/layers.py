"""Large models from small ones: all blocks are alike, so what two depths need says what any depth needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fusiontrain.config.schema import Config
from fusiontrain.models.shape import ModelShape
from fusiontrain.train.estimate.simulate import Simulated, simulate
from fusiontrain.types import Batch

SHALLOW = 3
"""Blocks, at least, of the models that are simulated. In fewer the first and the last one, which have only one neighbour, would be too large a part."""

Key = TypeVar("Key")


def with_shape(config: Config, shape: ModelShape, num_layers: int) -> Config:
    """The config of that model with so many blocks and random weights: of a base nothing is read."""
    sizes = {name: getattr(shape, name) for name in ("vocab_size", "dim", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "tie_embeddings")}
    model = config.model.model_copy(update={**sizes, "base": None, "num_layers": num_layers})
    return config.model_copy(update={"model": model})


def simulate_layers(config: Config, shape: ModelShape, batch: Batch, micro_batches: int, world_size: int) -> Simulated:
    """`simulate` for a model of any depth. A moment's peak is at one of its ends, so it grows evenly with every block (or with every n, where every
    n-th one forgets its activations), and so does traffic."""
    period = config.parallel.activation_checkpointing_every if config.parallel.activation_checkpointing != "none" else 1
    depth = SHALLOW + (shape.num_layers - SHALLOW) % period
    if shape.num_layers <= depth + period:
        return simulate(with_shape(config, shape, shape.num_layers), batch, micro_batches, world_size)
    low, high = (simulate(with_shape(config, shape, depth), batch, micro_batches, world_size) for depth in (depth, depth + period))
    more = (shape.num_layers - depth) // period
    return Simulated(
        {moment: _extend(low.moments[moment], high.moments[moment], more) for moment in low.moments},
        _extend(low.calls, high.calls, more),
        _extend(low.bytes, high.bytes, more),
    )


def _extend(low: Mapping[Key, float], high: Mapping[Key, float], more: int) -> dict[Key, float]:
    """Values of a model that is `more` times as much deeper than `low` as `high` is."""
    return {key: low.get(key, 0) + more * (high.get(key, 0) - low.get(key, 0)) for key in {**low, **high}}
