"""The stages of the demo: each is one thing a user could have done by hand with the commands of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusiontrain.studies.child import read_metrics

EDGE_STEPS = 20
"""Losses "at the start" and "at the end" are means over this many steps."""


def mean_of(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Mean of the values of `key` that are numbers; None without one."""
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return sum(values) / len(values) if values else None


def same_steps(original: Path, replay: Path) -> tuple[bool, int]:
    """Whether every step that both runs recorded has bitwise equal losses and gradient norm, and how many such steps there are."""
    keys = ("loss", "loss/text", "loss/image", "grad_norm", "lr", "tokens")
    rows = {row["step"]: [row[key] for key in keys] for row in read_metrics(original)}
    pairs = [(rows[row["step"]], [row[key] for key in keys]) for row in read_metrics(replay) if row["step"] in rows]
    return bool(pairs) and all(before == after for before, after in pairs), len(pairs)


def text_logits_identical(run: Path, llama: Path) -> tuple[bool, int]:
    """Whether the trained model gives validation texts bit for bit the logits of the Llama it came from; and on how many tokens."""
    import torch

    from fusiontrain.data.loader import Loader
    from fusiontrain.models.build import build_model
    from fusiontrain.train.inference import load_for_inference

    trained = load_for_inference(run)
    model, config = trained.model, trained.config
    data = config.data.model_copy(update={"modalities": ("text",)})
    dense_model = config.model.model_copy(update={"recipe": "dense", "base": str(llama)})
    dense = build_model(config.model_copy(update={"data": data, "model": dense_model}))
    loader = Loader(config.model_copy(update={"data": data}), trained.tokenizer, "validation", 0, 1)
    same, tokens = True, 0
    with contextlib.closing(loader), torch.no_grad():
        for batch in next(loader.iterate(0))[0]:
            same &= torch.equal(model.text_logits(batch), dense.text_logits(batch))
            tokens += batch.token_counts["text"]
    return same, tokens
