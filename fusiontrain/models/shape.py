"""The size of a transformer: what a Llama `config.json` says, or the model section of a config without a base."""

from __future__ import annotations

from dataclasses import dataclass

from fusiontrain.config.schema import ModelConfig
from fusiontrain.utils.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling: low frequencies are slowed by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """All sizes in numbers of features, heads, layers and tokens. norm_position: pre, post; qk_norm: none, rms, layer; dropout: a share."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    norm_position: str = "pre"
    qk_norm: str = "none"
    dropout: float = 0.0


def shape_from_config(model: ModelConfig) -> ModelShape:
    """The shape of a model that starts from random weights.

    Raises UserError naming the sizes that are missing.
    """
    needed = ("vocab_size", "dim", "num_layers", "num_heads", "ffn_dim")
    missing = [name for name in needed if getattr(model, name) is None]
    if missing:
        raise UserError(f"model: without model.base these sizes must be given: {', '.join('model.' + name for name in missing)}")
    assert model.vocab_size and model.dim and model.num_layers and model.num_heads and model.ffn_dim
    return ModelShape(
        vocab_size=model.vocab_size,
        dim=model.dim,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim or model.dim // model.num_heads,
        ffn_dim=model.ffn_dim,
        rope_theta=model.rope_theta or 10_000.0,
        norm_eps=model.norm_eps or 1e-5,
        tie_embeddings=bool(model.tie_embeddings),
        norm_position=model.norm_position or "pre",
        qk_norm=model.qk_norm or "none",
        dropout=model.dropout,
    )
