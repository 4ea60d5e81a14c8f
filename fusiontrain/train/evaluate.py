"""What a model is worth in between: validation loss per modality, and pictures of the configured prompts.

Always the same batches with the same noise, and the same prompts from the same noise: two evaluations differ by the model alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from fusiontrain.config.schema import Config
from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.generate.paint import paint_as_configured
from fusiontrain.modality import MODALITY_NAMES, table_of
from fusiontrain.parallel.fsdp import free_gathered
from fusiontrain.parallel.reduce import sum_tensor
from fusiontrain.train.step import global_counts


@torch.no_grad()
def validation_losses(
    model: nn.Module, loader: Loader, num_batches: int, device: torch.device, between: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean loss of each modality over the first `num_batches` global batches of `loader`; NaN where there is no target.

    All ranks call this together. A loader of one rank and a loader of many give the same result up to rounding.
    between: called before every batch; what it raises ends the evaluation.
    """
    sums = torch.zeros(len(MODALITY_NAMES), dtype=torch.float64, device=device)
    targets, names, was_training = dict.fromkeys(MODALITY_NAMES, 0), set[str](), model.training
    model.eval()
    try:
        for micro_batches, _ in itertools.islice(loader.iterate(0), num_batches):
            between()
            counts = global_counts(micro_batches)
            targets = {name: targets[name] + counts.targets[name] for name in MODALITY_NAMES}
            for batch in micro_batches:
                names |= batch.target_counts.keys()
                for name, term in model(batch.to(device)).items():
                    sums[MODALITY_NAMES.index(name)] += term.sum
    finally:
        model.train(was_training)
        free_gathered(model)
    totals = sum_tensor(sums).tolist()
    sums_of = dict(zip(MODALITY_NAMES, totals, strict=True))
    return {m.name: sums_of[m.name] / targets[m.name] if targets[m.name] else math.nan for m in table_of(names)}


def paint_prompts(model: nn.Module, tokenizer: Tokenizer, config: Config, between: Callable[[], None] = lambda: None) -> list[np.ndarray]:
    """A picture of every prompt of the config, in their order, [H, W, 3] uint8. All ranks call this together.

    between: called before every denoising step; what it raises ends the painting.
    """
    return paint_as_configured(model, tokenizer, config.sample.prompts, config, config.seed, between)
