"""Text to text: a prompt continued as the language model that every recipe is."""

from __future__ import annotations

from collections.abc import Sequence

from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.generate.stream import Writing, check_fits, evaluating, opening, read_tokens, write_text
from fusiontrain.models.fusion import FusionModel
from fusiontrain.utils.errors import UserError


def write(
    model: FusionModel, tokenizer: Tokenizer, prompts: Sequence[str], *, writing: Writing, batch_size: int = 32, context: int | None = None
) -> list[str]:
    """What follows each prompt, as it would stand behind it, until EOS or the budget; of images and speech nothing is written.

    Raises UserError for an empty prompt where the tokenizer has no BOS, and for one that does not fit the context with `writing.max_new_tokens`.
    """
    rows = [[*opening(tokenizer), *tokenizer.encode(prompt)] for prompt in prompts]
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"prompt {number + 1}: is empty, and the tokenizer has no token to begin a text with: give it a word")
        check_fits(len(row) + writing.max_new_tokens, context, f"prompt {number + 1} with max_new_tokens of text")
    texts: list[str] = []
    with evaluating(model):
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            cache = model.new_cache(len(batch), max(map(len, batch)) + writing.max_new_tokens)
            logits = read_tokens(model, cache, batch)
            numbers = range(first, first + len(batch))
            written = write_text(model, tokenizer, cache, logits, writing, stop_ids=(tokenizer.end_text_id,), row_numbers=numbers)
            texts += [tokenizer.decode(row) for row in written.tokens]
    return texts
