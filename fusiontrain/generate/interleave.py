"""Free generation: a model that writes text, decides when to paint, and reads its own picture before it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.generate.caption import read_image
from fusiontrain.generate.paint import paint_into
from fusiontrain.generate.pictures import from_pictures, grid_of, to_pictures
from fusiontrain.generate.stream import Writing, check_fits, evaluating, opening, read_tokens, write_text
from fusiontrain.models.cache import KVCache
from fusiontrain.models.fusion import FusionModel
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import hash_key

Piece = str | np.ndarray
"""Text, or a picture [H, W, 3] uint8."""


def interleave(
    model: FusionModel,
    tokenizer: Tokenizer,
    prompt: Sequence[Piece],
    *,
    image: ImageDataConfig,
    writing: Writing,
    max_images: int,
    steps: int,
    guidance: float,
    context: int,
    sampler: str = "auto",
    eta: float = 0.0,
) -> list[Piece]:
    """Continue one document -> the new pieces in reading order.

    Text is written until BOI, which starts an image; the finished image is read back clean (noise level 0), EOI follows by rule, and text goes on
    until EOS (Transfusion, section 3). `writing.max_new_tokens` bounds the text of the whole document, `max_images` its new images, `context` all of
    it in tokens. Raises UserError for an empty prompt, or one that does not fit the context with that text.
    """
    if not len(prompt):
        raise UserError("interleaving needs a prompt: give it at least one text or picture")
    grid = grid_of(model, image)
    patches = grid[0] * grid[1]
    produced: list[Piece] = []
    with evaluating(model):
        cache, logits = _read_prompt(model, tokenizer, prompt, image, writing.max_new_tokens, context)
        text: list[int] = []
        num_written = num_images = 0
        while True:
            # An image costs its patches, BOI and EOI, and one place for the token after it. While one may come, its places are kept free.
            may_paint = num_images < max_images and _room(cache, context) >= patches + 3
            room = _room(cache, context) - (patches + 2 if may_paint else 0)
            limited = replace(writing, max_new_tokens=min(writing.max_new_tokens - num_written, room))
            stop_ids = [tokenizer.end_text_id, *([tokenizer.begin_image_id] if may_paint else [])]
            place = num_written + num_images
            written = write_text(model, tokenizer, cache, logits, limited, stop_ids=stop_ids, row_numbers=[0], first_place=place)
            text += written.tokens[0]
            num_written += len(written.tokens[0])
            if written.ended_by[0] is None and num_written < writing.max_new_tokens and _room(cache, context):
                logits = written.logits  # the places that were kept for an image are for text after all
                continue
            if text:
                produced.append(tokenizer.decode(text).strip())
            if written.ended_by[0] != tokenizer.begin_image_id:
                return produced
            read_tokens(model, cache, [[tokenizer.begin_image_id]])
            key = hash_key(writing.seed, num_images)
            values = paint_into(model, tokenizer, cache, [key], image, steps, guidance, grid, sampler=sampler, eta=eta)
            produced += to_pictures(model, values, grid)
            logits = read_image(model, tokenizer, cache, values, grid)
            text, num_images = [], num_images + 1


def _room(cache: KVCache, context: int) -> int:
    return context - int(cache.lengths[0])


def _read_prompt(
    model: FusionModel, tokenizer: Tokenizer, prompt: Sequence[Piece], image: ImageDataConfig, max_new_tokens: int, context: int
) -> tuple[KVCache, torch.Tensor]:
    """A cache of one row that holds the prompt, and the logits [1, V] behind it."""
    grid = grid_of(model, image)
    encoded = [tokenizer.encode(piece) if isinstance(piece, str) else piece for piece in prompt]
    needed = len(opening(tokenizer)) + sum(len(p) if isinstance(p, list) else grid[0] * grid[1] + 2 for p in encoded)
    check_fits(needed + max_new_tokens, context, "the prompt with max_new_tokens of text")
    cache = model.new_cache(1, context)
    pending, logits = opening(tokenizer), None
    for piece in encoded:
        if isinstance(piece, list):
            pending = [*pending, *piece]
            continue
        read_tokens(model, cache, [[*pending, tokenizer.begin_image_id]])
        logits = read_image(model, tokenizer, cache, from_pictures(model, [piece], image), grid)
        pending = []
    if pending:
        logits = read_tokens(model, cache, [pending])
    if logits is None:
        raise UserError("interleaving needs a prompt: the given text has no tokens")
    return cache, logits
