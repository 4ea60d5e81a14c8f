"""Text to speech, as units of a quantiser: a model that learnt them says nothing else between the two tokens of speech."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fusiontrain.config.schema import Config
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.generate.stream import Writing, check_fits, evaluating, opening, read_tokens, write_allowed
from fusiontrain.modality import SPEECH
from fusiontrain.models.fusion import FusionModel
from fusiontrain.utils.errors import UserError


def speak(model: FusionModel, tokenizer: Tokenizer, prompts: Sequence[str], *, config: Config, writing: Writing) -> list[list[int]]:
    """The units behind each prompt, each in [0, data.speech.num_units), until the end of speech or `writing.max_new_tokens`.

    config: what the model was trained with. Raises UserError for a model without speech and a prompt that does not fit the context.
    """
    num_units = config.data.speech.num_units
    if SPEECH.name not in config.data.modalities or num_units is None:
        raise UserError("this model learnt no speech: speaking needs one trained with speech in data.modalities")
    assert tokenizer.begin_speech_id is not None and tokenizer.end_speech_id is not None, "load_tokenizer asks for them where there is speech"
    first = int(tokenizer.speech_ids(np.zeros(1, np.int64), config.data)[0])
    rows = [[*opening(tokenizer), *tokenizer.encode(prompt), tokenizer.begin_speech_id] for prompt in prompts]
    for number, row in enumerate(rows):
        check_fits(len(row) + writing.max_new_tokens, config.data.sequence_length, f"prompt {number + 1} with max_new_tokens of speech")
    with evaluating(model):
        cache = model.new_cache(len(rows), max(map(len, rows)) + writing.max_new_tokens)
        logits = read_tokens(model, cache, rows)
        forbidden = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        forbidden[first : first + num_units] = forbidden[tokenizer.end_speech_id] = False
        written = write_allowed(
            model, cache, logits, writing, forbidden=forbidden, stop_ids=(tokenizer.end_speech_id,), row_numbers=range(len(rows)), modality=SPEECH.id
        )
    return [[token - first for token in row] for row in written.tokens]
