"""Which implementation of each operator a model uses: chosen once, where the model is built, and handed to the layers by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fusiontrain.config.schema import KernelsConfig
from fusiontrain.models.shape import ModelShape
from fusiontrain.utils.errors import UserError
from fusiontrain_kernels import choices

OPERATORS = {
    "attention": "masked_routing_attention",
    "gemm": "modality_gemm",
    "norm": "rms_norm",
    "rope": "rope",
    "swiglu": "swiglu",
    "cross_entropy": "linear_cross_entropy",
}
"""Keys of the config's kernels section, and the operator that each is about."""


@dataclass(frozen=True)
class Kernels:
    """The implementation of each operator, by name, none of them "auto"; and `origin`, a line for the log: what was chosen and why."""

    attention: str
    gemm: str
    norm: str
    rope: str
    swiglu: str
    cross_entropy: str
    origin: str = field(default="", compare=False)

    @property
    def fuses_swiglu(self) -> bool:
        """Whether gate, up and activation are one launch: what the Triton GEMM offers when the activation is Triton's too."""
        return self.gemm == self.swiglu == "triton"


def choose_kernels(config: KernelsConfig, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The choices for a model of `shape` that computes in `dtype` on `device`.

    Raises UserError where an implementation that was asked for by name cannot run there; "auto" takes another one.
    """
    widths = _widths(shape)
    names: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for key, operator in OPERATORS.items():
        own = getattr(config, key)
        asked, setting = (config.impl, f"kernels.impl={config.impl}") if own is None else (own, f"kernels.{key}={own}")
        if asked == "auto":
            names[key], why = choices.best(operator, device, dtype, widths.get(key, ()))
            reasons[key] = f"{setting}: {why}"
            continue
        why_not = choices.obstacle(operator, asked, device, dtype, widths.get(key, ()))
        if why_not:
            others = ", ".join(_usable(operator, device, dtype, widths.get(key, ())))
            advice = f"kernels.impl to auto, or kernels.{key} to one of {others}" if own is None else f"kernels.{key} to auto or one of {others}"
            raise UserError(f"{setting}: {operator} cannot use it here: {why_not}; set {advice}")
        names[key], reasons[key] = asked, setting
    return Kernels(**names, origin=f"kernels on {device.type}: {_describe(names, reasons)}")


def _describe(names: Mapping[str, str], reasons: Mapping[str, str]) -> str:
    """Choices with the same reason stand together."""
    parts: dict[str, list[str]] = {}
    for key, name in names.items():
        parts.setdefault(reasons[key], []).append(f"{key} {name}")
    return "; ".join(f"{', '.join(chosen)} ({reason})" for reason, chosen in parts.items())


def _widths(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """What operators are particular about: head dims, and numbers of features in and out of projections."""
    heads = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim)
    return {"attention": (shape.head_dim,), "gemm": (shape.dim, shape.ffn_dim, *heads)}


def _usable(operator: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> list[str]:
    return [name for name in choices.IMPLEMENTATIONS[operator] if not choices.obstacle(operator, name, device, dtype, widths)]
