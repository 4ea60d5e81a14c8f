"""Text to picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fusiontrain.config.schema import Config, ImageDataConfig
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.generate.guidance import Grid, Predict, denoise, guide
from fusiontrain.generate.pictures import grid_of, patch_numbers, to_pictures
from fusiontrain.generate.stream import check_fits, device_of, evaluating, opening, read_tokens
from fusiontrain.models.cache import KVCache
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.modalities.patches import unpatchify
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import hash_key


def paint(
    model: FusionModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    image: ImageDataConfig,
    steps: int,
    guidance: float,
    seed: int,
    sampler: str = "auto",
    eta: float = 0.0,
    batch_size: int = 32,
    context: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """One picture per prompt, [H, W, 3] uint8.

    image: how the model's pictures are cut (`config.data.image`). steps: denoising steps. guidance: scale of classifier-free guidance, 1 = none.
    sampler, eta: see samplers.py. Starting noise is keyed by (seed, number of the prompt): batch_size bounds memory and changes nothing else
    beyond rounding.
    context: longest sequence in tokens (`config.data.sequence_length`). Raises UserError for a model that cannot paint and for a prompt that is too long.
    between: called before every denoising step; what it raises ends the painting.
    """
    grid = grid_of(model, image)
    batches = _painted(
        model, tokenizer, prompts, grid, batch_size, context, seed, image=image, steps=steps, guidance=guidance, sampler=sampler, eta=eta, between=between
    )
    with evaluating(model):
        return [picture for values in batches for picture in to_pictures(model, values, grid)]


def paint_latents(
    model: FusionModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    side: int,
    *,
    image: ImageDataConfig,
    seed: int,
    batch_size: int = 32,
    context: int | None = None,
    **settings: Any,
) -> list[np.ndarray]:
    """A latent [C, side, side] float32 of each prompt, as a `.latent.npy` member holds it, by a model that was trained on such.

    settings: `steps`, `guidance`, `sampler` and `eta`, as of `paint`. Raises UserError for a model of pixels, codes or text, a side that patches do not
    divide, and a prompt that is too long.
    """
    if model.image is None or image.representation != "latents":
        raise UserError("this model was not trained on latents (data.image.representation): ask it for pictures or text, without --latents")
    if side < image.patch_size or side % image.patch_size:
        raise UserError(f"latents of {side} x {side} cells: the side must be a multiple of data.image.patch_size={image.patch_size}")
    grid = (side // image.patch_size, side // image.patch_size)
    batches = _painted(model, tokenizer, prompts, grid, batch_size, context, seed, image=image, **settings)
    with evaluating(model):
        return [latent for values in batches for latent in unpatchify(values.float(), grid, image.channels).cpu().numpy()]


def _painted(
    model: FusionModel, tokenizer: Tokenizer, prompts: Sequence[str], grid: Grid, batch_size: int, context: int | None, seed: int, **settings: Any
) -> Iterator[torch.Tensor]:
    """Clean patches [B, N, C] of one batch of prompts after the other, in evaluation mode. settings: of `paint_into`."""
    rows = [[*opening(tokenizer), *tokenizer.encode(prompt), tokenizer.begin_image_id] for prompt in prompts]
    for number, row in enumerate(rows):
        check_fits(len(row) + grid[0] * grid[1], context, f"prompt {number + 1} with its picture")
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        keys = [hash_key(seed, first + i) for i in range(len(batch))]
        cache = model.new_cache(len(batch), max(map(len, batch)) + grid[0] * grid[1])
        read_tokens(model, cache, batch)
        yield paint_into(model, tokenizer, cache, keys, grid=grid, **settings)


def paint_as_configured(
    model: FusionModel, tokenizer: Tokenizer, prompts: Sequence[str], config: Config, seed: int, between: Callable[[], None] = lambda: None
) -> list[np.ndarray]:
    """`paint` as the `data` and `sample` of a config say."""
    sample, data = config.sample, config.data
    return paint(
        model,
        tokenizer,
        prompts,
        image=data.image,
        steps=sample.steps,
        guidance=sample.guidance,
        seed=seed,
        sampler=sample.sampler,
        eta=sample.ddim_eta,
        context=data.sequence_length,
        between=between,
    )


def paint_into(
    model: FusionModel,
    tokenizer: Tokenizer,
    cache: KVCache,
    keys: Sequence[int],
    image: ImageDataConfig,
    steps: int,
    guidance: float,
    grid: Grid,
    *,
    sampler: str = "auto",
    eta: float = 0.0,
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Clean patches [B, N, C] of the images that follow a BOI which ends each row of the cache; the cache is left as it was.

    keys [B]: of the noise of each image. between: called before every denoising step.
    """
    predict = _predictor(model, cache, grid, between)
    if guidance != 1:
        # A document whose text was dropped in training (data.condition_dropout) is BOS, BOI, image.
        unconditional = [*opening(tokenizer), tokenizer.begin_image_id]
        plain_cache = model.new_cache(len(keys), len(unconditional) + grid[0] * grid[1])
        read_tokens(model, plain_cache, [unconditional] * len(keys))
        predict = _guided(predict, _predictor(model, plain_cache, grid), guidance)
    # Pixels end at -1 and 1, and early noise estimates point far beyond; latents have no such bound.
    clip = 1.0 if image.representation == "pixels" and model.codec is None else None
    numbers, device = patch_numbers(model, image), device_of(model)
    return denoise(predict, model.image_objective, keys, numbers, grid, steps, device, sampler=sampler, eta=eta, clip=clip)


def _predictor(model: FusionModel, cache: KVCache, grid: Grid, before: Callable[[], None] = lambda: None) -> Predict:
    def predict(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        before()
        return model.decode_image(x, levels, grid, cache, commit=False)

    return predict


def _guided(with_text: Predict, without_text: Predict, scale: float) -> Predict:
    def predict(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        return guide(with_text(x, levels), without_text(x, levels), scale)

    return predict
