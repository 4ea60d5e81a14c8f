"""AdamW over what trains, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fusiontrain.config.schema import OptimizerConfig
from fusiontrain.parallel.activation import clean_name
from fusiontrain.utils.errors import UserError


def decays(name: str, parameter: nn.Parameter, embeddings: set[str]) -> bool:
    """Weight decay is for matrices and convolution kernels: not for norms, biases and embedding tables."""
    return parameter.ndim >= 2 and name not in embeddings


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the weights of `nn.Embedding` modules, as the model spells them (also of a head that shares one)."""
    return {clean_name(f"{name}.weight") for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def build_optimizer(parameters: Mapping[str, nn.Parameter], embeddings: set[str], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with one group that decays and one that does not; frozen parameters are in neither.

    The learning rate here is the peak; the trainer sets it anew at every step.
    """
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trainable:
        raise UserError("model: no parameter trains; set model.freeze_text=false, or choose a recipe with an image side")
    decaying = {name for name, parameter in trainable.items() if decays(name, parameter, embeddings)}
    groups = [
        {"params": [trainable[name] for name in trainable if name in decaying], "weight_decay": config.weight_decay},
        {"params": [trainable[name] for name in trainable if name not in decaying], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
