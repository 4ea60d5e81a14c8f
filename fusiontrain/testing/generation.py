"""Models and tokenizers for tests of generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusiontrain.config.schema import Config, TokenizerConfig
from fusiontrain.data.tokenizer import byte_tokenizer
from fusiontrain.models.build import build_model
from fusiontrain.models.cache import KVCache
from fusiontrain.models.fusion import FusionModel

TOKENIZER = byte_tokenizer(TokenizerConfig())
BOS, EOS, BOI, EOI = 256, 257, 258, 259


def lively_model(config: Config) -> FusionModel:
    """A model of `config` in evaluation mode whose every output depends on its input: no weight is zero or a copy of another."""
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


class ScriptedModel:
    """A model that reads for real, but whose logits always ask for the next token of a script, one script per row of the batch.

    A script moves on when its token is fed back; its last token is asked for ever after. `read` is what went into the cache, row by row:
    token ids, and images [N, C] where an image was committed. `logits` are the model's own, of the last call.
    """

    def __init__(self, model: FusionModel, scripts: Sequence[Sequence[int]]) -> None:
        self.model, self.scripts = model, [list(script) for script in scripts]
        self.read: list[list[Any]] = [[] for _ in scripts]
        self.logits = torch.zeros(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def decode_text(self, token_ids: torch.Tensor, cache: KVCache, lengths: torch.Tensor) -> torch.Tensor:
        if cache.max_length == len((BOS, BOI)) + self.picture_patches:  # the unconditional stream of guidance
            return self.model.decode_text(token_ids, cache, lengths)
        self.logits = self.model.decode_text(token_ids, cache, lengths)
        wanted = torch.zeros_like(self.logits)
        for row, script in enumerate(self.scripts):
            new = token_ids[row, : int(lengths[row])].tolist()
            self.read[row] += new
            if new == script[:1] and len(script) > 1:
                del script[0]
            wanted[row, :, script[0]] = 1
        return wanted

    picture_patches = 4

    def decode_image(self, values: torch.Tensor, levels: torch.Tensor, grid: tuple[int, int], cache: KVCache, commit: bool) -> torch.Tensor:
        if commit:
            for row, image in enumerate(values):
                self.read[row].append(image)
        return self.model.decode_image(values, levels, grid, cache, commit)
