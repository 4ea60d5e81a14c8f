"""Reading tokens into a KV cache and writing text out of it: the parts that painting, captioning and interleaving share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.models.cache import KVCache
from fusiontrain.models.fusion import FusionModel
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import keyed_uniform


@dataclass(frozen=True)
class Writing:
    """How text is chosen. temperature 0: always the most likely token; seed: of the draws at a temperature above 0."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """B rows of new text: their tokens without the stop token, that token (None where the budget ended the row), and the logits [B, V] behind it all."""

    tokens: list[list[int]]
    ended_by: list[int | None]
    logits: torch.Tensor


@contextmanager
def evaluating(model: FusionModel) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is put back afterwards, since training samples in between its steps."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def device_of(model: FusionModel) -> torch.device:
    return model.device


def opening(tokenizer: Tokenizer) -> list[int]:
    """The tokens before every document: BOS, where the tokenizer has one."""
    return [] if tokenizer.begin_text_id is None else [tokenizer.begin_text_id]


def check_fits(num_tokens: int, context: int | None, what: str) -> None:
    """Raises UserError when `num_tokens` exceed the context that the model was trained on (None: no limit known)."""
    if context is not None and num_tokens > context:
        raise UserError(f"{what}: needs {num_tokens} tokens, but the model's context (data.sequence_length) is {context}: shorten it")


def read_tokens(model: FusionModel, cache: KVCache, rows: Sequence[Sequence[int]], **options: int) -> torch.Tensor:
    """Append B rows of tokens, of any lengths >= 1, to the cache -> logits behind each row's last token, [B, V] float32.

    options: `modality`, where they are no text.
    """
    device = device_of(model)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = max(len(row) for row in rows)
    token_ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device)
    logits = model.decode_text(token_ids, cache, lengths, **options)
    return logits[torch.arange(len(rows), device=device), lengths - 1].float()


def write_text(
    model: FusionModel,
    tokenizer: Tokenizer,
    cache: KVCache,
    logits: torch.Tensor,
    writing: Writing,
    *,
    stop_ids: Collection[int],
    row_numbers: Sequence[int],
    first_place: int = 0,
) -> Written:
    """Continue B rows from `logits` [B, V] until a stop token or `max_new_tokens`.

    row_numbers [B] and first_place key the draws, so that a row does not depend on its neighbours. The cache holds every token that is
    returned, and no stop token.
    """
    forbidden = _never_written(tokenizer, logits.shape[-1], stop_ids).to(logits.device)
    return write_allowed(
        model, cache, logits, writing, forbidden=forbidden, stop_ids=stop_ids, row_numbers=row_numbers, first_place=first_place
    )


def write_allowed(
    model: FusionModel,
    cache: KVCache,
    logits: torch.Tensor,
    writing: Writing,
    *,
    forbidden: torch.Tensor,
    stop_ids: Collection[int],
    row_numbers: Sequence[int],
    first_place: int = 0,
    **options: int,
) -> Written:
    """`write_text` of all tokens but the `forbidden` [V] bool. options: `modality`, where they are no text."""
    written: list[list[int]] = [[] for _ in row_numbers]
    ended_by: list[int | None] = [None] * len(written)
    live = [True] * len(written)
    for place in range(first_place, first_place + writing.max_new_tokens):
        chosen = choose(logits.masked_fill(forbidden, -torch.inf), writing, row_numbers, place)
        for row, token in enumerate(chosen):
            if live[row] and token in stop_ids:
                live[row], ended_by[row] = False, token
            elif live[row]:
                written[row].append(token)
        if not any(live):
            break
        # A finished row rides along and adds nothing: its new length is 0.
        new_tokens = torch.tensor(chosen, device=logits.device)[:, None]
        logits = model.decode_text(new_tokens, cache, torch.tensor(live, device=logits.device).long(), **options)[:, 0].float()
    return Written(written, ended_by, logits)


def _never_written(tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]) -> torch.Tensor:
    """[V] bool: markers that only the sampler may set (BOS, EOI, and any marker that is no stop here), codes, and rows of the head without a token."""
    forbidden = torch.arange(vocab_size) >= tokenizer.vocab_size
    markers = {tokenizer.begin_image_id, tokenizer.end_image_id, tokenizer.end_text_id, *opening(tokenizer)}
    markers |= {marker for marker in (tokenizer.begin_speech_id, tokenizer.end_speech_id) if marker is not None}
    forbidden[[marker for marker in markers if marker not in stop_ids]] = True
    forbidden[list(tokenizer.code_ids)] = True
    return forbidden


def choose(logits: torch.Tensor, writing: Writing, row_numbers: Sequence[int], place: int) -> list[int]:
    """A token for each row of `logits` [B, V], drawn by (seed, row number, place) where the temperature is above 0."""
    if writing.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    draws = [keyed_uniform(writing.seed, number, place) for number in row_numbers]
    cumulative = torch.softmax(logits.double() / writing.temperature, dim=-1).cumsum(dim=-1)
    cumulative = cumulative / cumulative[:, -1:]
    # right=True steps over tokens of probability 0 when the draw is exactly 0.
    places = torch.searchsorted(cumulative, torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None], right=True)
    return places[:, 0].tolist()
