"""Free generation with a model whose images are codes: text outside, exactly as many codes as an image has between BOI and EOI.

Chameleon's own masking (arXiv 2405.09818, section 2): a model that may say anything anywhere says a code too few now and then, which no decoder of
images can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fusiontrain.config.schema import Config, ImageDataConfig
from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import CODES_SUFFIX
from fusiontrain.data.modalities.image import decode_codes
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.generate.stream import Writing, check_fits, choose, evaluating, opening, read_tokens, write_text
from fusiontrain.modality import IMAGE
from fusiontrain.models.cache import KVCache
from fusiontrain.models.fusion import FusionModel
from fusiontrain.utils.errors import UserError

Piece = str | np.ndarray
"""Text, or the codes of an image [n] int64."""


@dataclass(frozen=True)
class CodeSpace:
    """ids: the tokens of the codes 0, 1, ...; per_image: how many an image has."""

    ids: tuple[int, ...]
    per_image: int


def code_space(config: Config, tokenizer: Tokenizer) -> CodeSpace:
    """Of a model that was trained with `config`, where a code stands for `data.image.patch_size` x `patch_size` pixels of a square picture of
    `data.image.size`. Raises UserError where its images are no codes."""
    image = config.data.image
    if image.representation != "codes" or image.codebook_size is None:
        raise UserError(f"data.image.representation={image.representation}: this model writes no codes; sample it as one that paints")
    return CodeSpace(tuple(tokenizer.image_ids(np.arange(image.codebook_size)).tolist()), (image.size // image.patch_size) ** 2)


def load_codes(path: str, image: ImageDataConfig) -> np.ndarray:
    """A `.vq.npy` file [h, w] -> its codes [h * w] int64. Raises UserError when it is missing, no such array, or not of the model's codebook."""
    try:
        return decode_codes(CODES_SUFFIX, Path(path).read_bytes(), image)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except BadSample as error:
        raise UserError(f"{path}: {error}") from error


def write_codes(
    model: FusionModel, cache: KVCache, logits: torch.Tensor, codes: CodeSpace, writing: Writing, row_numbers: Sequence[int], first_place: int = 0
) -> torch.Tensor:
    """The image of every row whose last token is BOI and whose logits [B, V] are behind it -> codes [B, n] int64, which the cache then holds."""
    written, ids = [], torch.tensor(codes.ids, device=logits.device)
    for place in range(first_place, first_place + codes.per_image):
        written.append(choose(logits[:, ids].float(), writing, row_numbers, place))
        logits = model.decode_text(ids[written[-1]][:, None], cache, modality=IMAGE.id)[:, 0]
    return torch.tensor(written).reshape(codes.per_image, -1).T


def paint_codes(
    model: FusionModel, tokenizer: Tokenizer, prompts: Sequence[str], *, codes: CodeSpace, writing: Writing, context: int | None = None
) -> torch.Tensor:
    """One image per prompt, [B, n] int64. Raises UserError for a prompt that does not fit the context with its image."""
    rows = [[*opening(tokenizer), *tokenizer.encode(prompt), tokenizer.begin_image_id] for prompt in prompts]
    for number, row in enumerate(rows):
        check_fits(len(row) + codes.per_image, context, f"prompt {number + 1} with its picture")
    with evaluating(model):
        cache = model.new_cache(len(rows), max(map(len, rows)) + codes.per_image)
        return write_codes(model, cache, read_tokens(model, cache, rows), codes, writing, range(len(rows)))


def caption_codes(
    model: FusionModel, tokenizer: Tokenizer, images: Sequence[np.ndarray], *, codes: CodeSpace, writing: Writing, context: int | None = None
) -> list[str]:
    """One text per image ([n] int64), as a document that begins with it and goes on until EOS, BOI or the budget.

    Raises UserError for images of another number of codes, and when an image and the budget do not fit the context.
    """
    for image in images:
        _check_codes(image, codes)
    before = [*opening(tokenizer), tokenizer.begin_image_id]
    length = len(before) + codes.per_image + 1 + writing.max_new_tokens
    check_fits(length, context, "a picture and max_new_tokens of caption")
    with evaluating(model):
        cache = model.new_cache(len(images), length)
        logits = _read_codes(model, tokenizer, cache, [before] * len(images), images, codes)
        stop_ids = (tokenizer.end_text_id, tokenizer.begin_image_id)
        written = write_text(model, tokenizer, cache, logits, writing, stop_ids=stop_ids, row_numbers=range(len(images)))
    return [tokenizer.decode(row).strip() for row in written.tokens]


def write_document(
    model: FusionModel, tokenizer: Tokenizer, prompt: Sequence[Piece], *, codes: CodeSpace, writing: Writing, max_images: int, context: int
) -> list[Piece]:
    """Continue one document of texts and images -> the new pieces in reading order.

    Text goes on until EOS, or until BOI, which exactly `codes.per_image` codes and EOI follow. `writing.max_new_tokens` bounds the text of the whole
    document, `max_images` its new images, `context` all of it in tokens: an image that would not fit is not begun. Raises UserError for an empty
    prompt, one that does not fit with that text, and images of another number of codes.
    """
    produced: list[Piece] = []
    with evaluating(model):
        cache = model.new_cache(1, context)
        logits = _read_prompt(model, tokenizer, cache, prompt, codes, writing.max_new_tokens, context)
        text: list[int] = []
        num_written = num_images = place = 0
        while True:
            # An image costs BOI, its codes and EOI, and one place for the token after it. While one may come, its places are kept free.
            may_paint = num_images < max_images and _room(cache, context) >= codes.per_image + 3
            room = _room(cache, context) - (codes.per_image + 2 if may_paint else 0)
            limited = replace(writing, max_new_tokens=min(writing.max_new_tokens - num_written, room))
            stop_ids = [tokenizer.end_text_id, *([tokenizer.begin_image_id] if may_paint else [])]
            written = write_text(model, tokenizer, cache, logits, limited, stop_ids=stop_ids, row_numbers=[0], first_place=place)
            text += written.tokens[0]
            num_written, place = num_written + len(written.tokens[0]), place + len(written.tokens[0])
            if written.ended_by[0] is None and num_written < writing.max_new_tokens and _room(cache, context):
                logits = written.logits  # the places that were kept for an image are for text after all
                continue
            if text:
                produced.append(tokenizer.decode(text).strip())
            if written.ended_by[0] != tokenizer.begin_image_id:
                return produced
            logits = read_tokens(model, cache, [[tokenizer.begin_image_id]])
            image = write_codes(model, cache, logits, codes, writing, [0], first_place=place + 1)
            produced.append(image[0].numpy())
            logits = read_tokens(model, cache, [[tokenizer.end_image_id]])
            text, num_images, place = [], num_images + 1, place + 1 + codes.per_image


def _room(cache: KVCache, context: int) -> int:
    return context - int(cache.lengths[0])


def _read_prompt(
    model: FusionModel, tokenizer: Tokenizer, cache: KVCache, prompt: Sequence[Piece], codes: CodeSpace, max_new_tokens: int, context: int
) -> torch.Tensor:
    """Logits [1, V] behind a prompt, which the cache of one row then holds."""
    encoded = [tokenizer.encode(piece) if isinstance(piece, str) else piece for piece in prompt]
    for piece in encoded:
        if isinstance(piece, np.ndarray):
            _check_codes(piece, codes)
    pending, logits = opening(tokenizer), None
    needed = len(pending) + sum(len(piece) + 2 * isinstance(piece, np.ndarray) for piece in encoded)
    check_fits(needed + max_new_tokens, context, "the prompt with max_new_tokens of text")
    for piece in encoded:
        if isinstance(piece, np.ndarray):
            logits = _read_codes(model, tokenizer, cache, [[*pending, tokenizer.begin_image_id]], [piece], codes)
            pending = []
        else:
            pending = [*pending, *piece]
    if pending:
        logits = read_tokens(model, cache, [pending])
    if logits is None:
        raise UserError("a document needs a prompt: give it at least one text or picture")
    return logits


def _check_codes(image: np.ndarray, codes: CodeSpace) -> None:
    if image.shape != (codes.per_image,) or image.min() < 0 or image.max() >= len(codes.ids):
        raise UserError(f"an image of a prompt must be {codes.per_image} codes from 0 to {len(codes.ids) - 1}, not {image.dtype} {list(image.shape)}")


def _read_codes(
    model: FusionModel, tokenizer: Tokenizer, cache: KVCache, before: Sequence[Sequence[int]], images: Sequence[np.ndarray], codes: CodeSpace
) -> torch.Tensor:
    """Append rows of tokens that end in BOI, the codes of an image behind each, and EOI -> logits behind EOI, [B, V] float32."""
    read_tokens(model, cache, before)
    read_tokens(model, cache, [[codes.ids[code] for code in image] for image in images], modality=IMAGE.id)
    return read_tokens(model, cache, [[tokenizer.end_image_id]] * len(images))
