"""Picture to text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.generate.pictures import from_pictures, grid_of
from fusiontrain.generate.stream import Writing, check_fits, device_of, evaluating, opening, read_tokens, write_text
from fusiontrain.models.cache import KVCache
from fusiontrain.models.fusion import FusionModel


def caption(
    model: FusionModel,
    tokenizer: Tokenizer,
    pictures: Sequence[np.ndarray],
    *,
    image: ImageDataConfig,
    writing: Writing,
    batch_size: int = 32,
    context: int | None = None,
) -> list[str]:
    """One text per picture ([H, W, 3] uint8 of any size), as a document that begins with its image and goes on until EOS, BOI or the budget.

    Raises UserError for a model without images and when the picture and the budget do not fit the context.
    """
    grid = grid_of(model, image)
    before = [*opening(tokenizer), tokenizer.begin_image_id]
    length = len(before) + grid[0] * grid[1] + 1 + writing.max_new_tokens
    check_fits(length, context, "a picture and max_new_tokens of caption")
    stop_ids = (tokenizer.end_text_id, tokenizer.begin_image_id)
    texts: list[str] = []
    with evaluating(model):
        for first in range(0, len(pictures), batch_size):
            values = from_pictures(model, pictures[first : first + batch_size], image)
            cache = model.new_cache(len(values), length)
            read_tokens(model, cache, [before] * len(values))
            logits = read_image(model, tokenizer, cache, values, grid)
            numbers = range(first, first + len(values))
            written = write_text(model, tokenizer, cache, logits, writing, stop_ids=stop_ids, row_numbers=numbers)
            texts += [tokenizer.decode(row).strip() for row in written.tokens]
    return texts


def read_image(model: FusionModel, tokenizer: Tokenizer, cache: KVCache, values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Append clean images [B, N, C] and their EOI to a cache whose rows end in BOI -> logits behind EOI, [B, V] float32."""
    clean = torch.zeros(len(values), device=device_of(model))
    model.decode_image(values, clean, grid, cache, commit=True)
    return read_tokens(model, cache, [[tokenizer.end_image_id]] * len(values))
