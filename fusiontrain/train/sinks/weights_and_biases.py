"""Weights & Biases: project, entity and mode are those of its own environment variables (WANDB_PROJECT, WANDB_MODE=offline, ...)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class WeightsAndBiases:
    """A run named after the run folder, where its files are kept too."""

    name, remote = "wandb", True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, run_id: str | None, config: Mapping[str, Any]) -> str | None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fusiontrain"),
            name=self.folder.resolve().name,
            dir=str(self.folder),
            id=run_id,
            resume="allow",
            config=dict(config),
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),  # the terminal belongs to the reporter
        )
        return self._run.id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, prompts: Sequence[str], pictures: Sequence[np.ndarray], sheet: Image.Image) -> None:
        import wandb

        self._run.log({"samples/pictures": [wandb.Image(picture, caption=prompt) for picture, prompt in zip(pictures, prompts, strict=True)]}, step=step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._run.summary[tag] = markdown

    def close(self) -> None:
        self._run.finish()
