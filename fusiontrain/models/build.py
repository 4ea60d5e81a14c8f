"""From a configuration to a model: the one place in `models/` that names recipes and objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fusiontrain.config.schema import Config, ModelConfig
from fusiontrain.config.validate import uses_images
from fusiontrain.models.base import base_shape, base_weights
from fusiontrain.models.fusion import FusionModel, Patcher
from fusiontrain.models.init import fill, random_weights
from fusiontrain.models.kernels import choose_kernels
from fusiontrain.models.modalities.image import LinearPatcher
from fusiontrain.models.modalities.unet import UNetPatcher
from fusiontrain.models.modalities.vae import LatentCodec
from fusiontrain.models.plan import ReadRows
from fusiontrain.models.recipes.chameleon import chameleon
from fusiontrain.models.recipes.dense import dense
from fusiontrain.models.recipes.lmfusion import lmfusion
from fusiontrain.models.recipes.mot import mot
from fusiontrain.models.recipes.recipe import Recipe
from fusiontrain.models.recipes.transfusion import transfusion
from fusiontrain.models.shape import shape_from_config
from fusiontrain.objectives.ddpm import Ddpm
from fusiontrain.objectives.flow_matching import FlowMatching
from fusiontrain.objectives.next_token import NextToken

CPU, META = torch.device("cpu"), torch.device("meta")
RECIPES: dict[str, Callable[[ModelConfig, Sequence[str]], Recipe]] = {
    "dense": dense, "transfusion": transfusion, "lmfusion": lmfusion, "mot": mot, "chameleon": chameleon
}  # fmt: skip


def build_model(config: Config, device: torch.device = CPU) -> FusionModel:
    """The model of `config` on the CPU in float32: random weights keyed by `seed`, and the base's weights where there is a base.

    device: where it is going to run; kernels are chosen for that. Frozen parameters have `requires_grad` off. Raises UserError for a base
    that is not a Llama folder and for kernels that cannot run there.
    """
    model = _construct(config, device, CPU)
    fill(model, first_weights(config, model))
    return model


def declare_model(config: Config, device: torch.device = CPU) -> FusionModel:
    """`build_model` without the weights: parameters on the meta device, where they take no memory; buffers have their values."""
    return _construct(config, device, META)


def first_weights(config: Config, model: FusionModel) -> ReadRows:
    """What the parameters of `model`, which may be declared only, start from. Raises UserError for a base that does not fit."""
    drawn = random_weights(config.seed, model.shape.num_layers)
    return base_weights(model, config.model, drawn) if config.model.base else drawn


def _construct(config: Config, device: torch.device, parameters_on: torch.device) -> FusionModel:
    shape = replace(base_shape(config.model.base), dropout=config.model.dropout) if config.model.base else shape_from_config(config.model)
    kernels = choose_kernels(config.kernels, shape, device, getattr(torch, config.parallel.precision))
    recipe = RECIPES[config.model.recipe](config.model, config.data.modalities)
    image: Patcher | None = None
    image_objective, codec, channels = None, None, 0
    if uses_images(config):
        codec = LatentCodec(config.model.image.vae) if config.model.image.vae and config.data.image.representation == "pixels" else None
        patch_dim = config.data.image.channels * config.data.image.patch_size**2
        patch_dim, channels = (codec.latent_patch_dim(patch_dim), codec.channels) if codec else (patch_dim, config.data.image.channels)
        image_objective = _image_objective(config)
    with parameters_on:
        if uses_images(config):
            image = _patcher(config, patch_dim, channels, shape.dim)
        model = FusionModel(
            shape,
            recipe,
            kernels,
            text_objective=NextToken(kernels.cross_entropy, config.objective.z_loss),
            image=image,
            image_objective=image_objective,
            image_channels=channels,
            image_input_scale=config.model.image.input_scale,
            images_causal=config.data.image.attention == "causal",
            codec=codec,
        )
    for name in model.plan().frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


def _patcher(config: Config, patch_dim: int, channels: int, dim: int) -> Patcher:
    image = config.model.image
    if image.patcher == "unet":
        return UNetPatcher(patch_dim, channels, dim, image.unet_channels, image.unet_blocks, image.position_embedding)
    return LinearPatcher(patch_dim, dim, image.position_embedding)


def _image_objective(config: Config) -> Ddpm | FlowMatching:
    if config.objective.image == "ddpm":
        return Ddpm(config.objective.num_timesteps, config.objective.prediction)
    return FlowMatching(config.objective.time_shift)
