"""What a run must remember to go on: numbers here, tensors by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fusiontrain.parallel.activation import clean_name


@dataclass(frozen=True)
class TrainState:
    """Host numbers after `step` optimizer steps.

    data: the data loader's own state, as plain values. tokens: trained on so far, by modality, all ranks.
    skipped_steps: steps that made no update (not finite, or a spike); skipped_in_a_row: how many of them just now, one after another.
    skipped_samples: unreadable samples so far, all ranks. history: the last losses and gradient norms, see `bad_steps.py`.
    """

    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_samples: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        return cls(**values)


def model_tensors(model: nn.Module, parameters: Mapping[str, nn.Parameter], include_frozen: bool) -> dict[str, torch.Tensor]:
    """What of the model is stored: parameters that train, frozen ones too if `include_frozen`, and persistent buffers.

    The tensors share their storage with the model, so loading into them loads the model.
    """
    tensors = {name: parameter.detach() for name, parameter in parameters.items() if parameter.requires_grad or include_frozen}
    every_parameter = {clean_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = {clean_name(name) for name in model.state_dict()}
    buffers = {clean_name(name): buffer for name, buffer in model.named_buffers()}
    tensors.update({name: buffers[name] for name in sorted(stored - every_parameter) if name in buffers})
    return tensors


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """AdamW's state as `name.exp_avg`, `name.exp_avg_sq`, `name.step`, created (zeros) where no step has been taken yet.

    The tensors are the optimizer's own, so loading into them loads the optimizer.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors.update({f"{name}.{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")})
    return tensors
