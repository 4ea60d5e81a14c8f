"""What a training did to the language of the Llama that it began with: nothing at all where the text side is frozen."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from fusiontrain.data.loader import Loader
from fusiontrain.models.build import build_model
from fusiontrain.train.inference import load_for_inference
from fusiontrain.types import IGNORE_INDEX


@dataclass(frozen=True)
class TextDrift:
    """identical: every logit bit for bit. tokens: text tokens compared. loss: of the trained model on them, less that of the Llama, per label."""

    identical: bool
    tokens: int
    loss: float


@torch.no_grad()
def text_drift(run: Path, llama: Path) -> TextDrift:
    """Compares the run's newest checkpoint with the Llama on the texts alone of the first global batch of the run's validation data."""
    trained = load_for_inference(run)
    model, config = trained.model, trained.config
    data = config.data.model_copy(update={"modalities": ("text",)})
    dense_model = config.model.model_copy(update={"recipe": "dense", "base": str(llama)})
    dense = build_model(config.model_copy(update={"data": data, "model": dense_model}))
    identical, tokens, labels, losses = True, 0, 0, [0.0, 0.0]
    with contextlib.closing(Loader(config.model_copy(update={"data": data}), trained.tokenizer, "validation", 0, 1)) as loader:
        for batch in next(loader.iterate(0))[0]:
            logits = [model.text_logits(batch), dense.text_logits(batch)]
            identical &= torch.equal(*logits)
            tokens += batch.token_counts["text"]
            targets = batch.labels[: len(logits[0])]
            labels += int((targets != IGNORE_INDEX).sum())
            for side, rows in enumerate(logits):
                losses[side] += functional.cross_entropy(rows.double(), targets, ignore_index=IGNORE_INDEX, reduction="sum").item()
    return TextDrift(identical, tokens, (losses[0] - losses[1]) / labels)
