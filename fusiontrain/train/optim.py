"""AdamW over what trains, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fusiontrain.config.schema import OptimizerConfig
from fusiontrain.modality import IMAGE
from fusiontrain.parallel.activation import clean_name
from fusiontrain.utils.errors import UserError


def decays(name: str, parameter: nn.Parameter, embeddings: set[str]) -> bool:
    """Weight decay is for matrices and convolution kernels: not for norms, biases and embedding tables."""
    return parameter.ndim >= 2 and name not in embeddings


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the weights of `nn.Embedding` modules, as the model spells them (also of a head that shares one)."""
    return {clean_name(f"{name}.weight") for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def is_image_side(name: str) -> bool:
    """Whether a parameter serves images alone: the patcher, and the images' own group of an untied part."""
    return name.startswith(f"{IMAGE.name}.") or f".{IMAGE.name}." in name


def build_optimizer(parameters: Mapping[str, nn.Parameter], embeddings: set[str], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; frozen parameters are not in it. Groups differ in weight decay and in `ratio`, their share of the learning rate: for all but the image
    side `text_learning_rate_ratio`.

    The learning rate here is the peak; the trainer sets it anew at every step.
    """
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trainable:
        raise UserError("model: no parameter trains; set model.freeze_text=false, or choose a recipe with an image side")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        weight_decay = config.weight_decay if decays(name, parameter, embeddings) else 0.0
        ratio = 1.0 if is_image_side(name) else config.text_learning_rate_ratio
        groups.setdefault((weight_decay, ratio), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": weight_decay, "lr": config.learning_rate * ratio, "ratio": ratio}
            for (weight_decay, ratio), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Every group to its share of `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["ratio"]
