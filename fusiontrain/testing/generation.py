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
    """A model that reads for real and then writes what a script says: each row of `script` is the next tokens of that row of the batch.

    `read` and `shown` keep what went into the cache, row by row: token ids, and images [N, C] where an image was committed.
    """

    def __init__(self, model: FusionModel, script: Sequence[Sequence[int]]) -> None:
        self.model, self.script = model, [list(row) for row in script]
        self.read: list[list[Any]] = [[] for _ in script]
        self.logits: torch.Tensor | None = None
        self._used = [0] * len(script)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def decode_text(self, token_ids: torch.Tensor, cache: KVCache, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The model's own logits are kept in `logits`; what comes back is 1 at the script's next token, which counts as read once it is fed."""
        self.logits = self.model.decode_text(token_ids, cache, lengths)
        logits = torch.zeros_like(self.logits)
        for row, count in enumerate(lengths.tolist() if lengths is not None else [token_ids.shape[1]] * len(token_ids)):
            self.read[row] += token_ids[row, :count].tolist()
            logits[row, :, self.script[row][min(self._used[row], len(self.script[row]) - 1)]] = 1
            self._used[row] += count > 0 and not (count == 1 and int(token_ids[row, 0]) == BOI)
        return logits

    def decode_image(self, values: torch.Tensor, levels: torch.Tensor, grid: tuple[int, int], cache: KVCache, commit: bool) -> torch.Tensor:
        if commit:
            for row, image in enumerate(values):
                self.read[row].append(image)
        return self.model.decode_image(values, levels, grid, cache, commit)
