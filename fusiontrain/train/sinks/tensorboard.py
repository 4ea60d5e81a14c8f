"""TensorBoard's event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class TensorBoard:
    """Continues a run after `step`: its reader forgets what older files hold of later steps."""

    name, remote = "tensorboard", False

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def open(self, run_id: str | None, config: Mapping[str, Any]) -> str | None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which ranks without a writer need not pay

        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        return None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        self._board.flush()

    def pictures(self, step: int, prompts: Sequence[str], pictures: Sequence[np.ndarray], sheet: Image.Image) -> None:
        self._board.add_image("samples/pictures", np.asarray(sheet.convert("RGB")), step, dataformats="HWC")
        self.text(step, "samples/prompts", "\n".join(f"{i + 1}. {prompt}" for i, prompt in enumerate(prompts)))

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._board.add_text(tag, markdown, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()
