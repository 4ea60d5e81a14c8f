"""FusionTrain: pretraining for models that read and write text and images in one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from fusiontrain.train.trained import Trained

__version__ = "0.1.0"


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, ema: bool = False) -> Trained:
    """The model of a run folder (its newest checkpoint), a checkpoint or an exported folder, in evaluation mode, with its config and tokenizer.

        trained = fusiontrain.load("runs/demo/lmfusion")
        trained.sample("a large red circle.")       # a picture
        trained.caption("scene.png")                # a text
        trained.model, trained.config, trained.tokenizer

    dtype: of weights and computation; None: as stored. ema: the moving average of the weights. Raises UserError for what cannot be loaded.
    """
    from fusiontrain.train.inference import load_for_inference  # torch takes seconds, and `import fusiontrain` none

    return load_for_inference(path, averaged=ema, device=device, dtype=dtype)
