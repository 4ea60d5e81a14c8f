"""What a run writes about itself: one JSON object per step, TensorBoard, and a log file per rank."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fusiontrain.data.errors import REASONS
from fusiontrain.utils.errors import UserError

METRICS_FILE = "metrics.jsonl"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
BAD_STEPS_FILE = "bad_steps.jsonl"

GROUPS = {
    "loss": "loss/total",
    "tokens": "tokens/all",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/learning_rate",
    "skipped": "health/skipped_samples",
    "skipped_steps": "health/skipped_steps",
    "memory_gib": "health/memory_gib",
    "epoch": "progress/epoch",
    "tokens_per_second": "throughput/tokens_per_second",
    "step_seconds": "throughput/step_seconds",
    "save_seconds": "throughput/save_seconds",
    "data_seconds": "throughput/data_seconds",
    "flops": "throughput/flops",
    "mfu": "throughput/mfu",
}
"""Key of metrics.jsonl -> TensorBoard tag; keys that have a group already (loss/text, validation/image) keep their name."""


class MetricsWriter:
    """The metrics of one run folder. Only the main rank has one."""

    def __init__(self, folder: Path, step: int) -> None:
        """Continue a run after `step`: whatever the files hold of later steps is dropped."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which ranks without a writer need not pay

        self.folder, self.path = folder, folder / METRICS_FILE
        truncate_metrics(self.path, step)
        bad_samples = folder / BAD_SAMPLES_FILE
        truncate_metrics(bad_samples, step)
        self._reasons = Counter(line["reason"] for line in read_metrics(bad_samples)) if bad_samples.exists() else Counter()
        self._bad_samples = bad_samples.open("a", encoding="utf-8")
        truncate_metrics(folder / BAD_STEPS_FILE, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one step's values to metrics.jsonl; numbers that JSON has no word for (NaN, infinity) become null."""
        self._file.write(json.dumps({key: _finite(value) for key, value in values.items()}) + "\n")
        self._file.flush()

    def bad_samples(self, findings: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """List findings in bad_samples.jsonl; returns the number so far of each reason, as `skipped/<reason>`."""
        self._bad_samples.writelines(json.dumps(finding) + "\n" for finding in findings)
        self._bad_samples.flush()
        self._reasons.update(finding["reason"] for finding in findings)
        return {f"skipped/{reason}": self._reasons[reason] for reason in REASONS}

    def bad_step(self, values: Mapping[str, Any]) -> None:
        """List a step that was not as usual, with where its documents came from, in bad_steps.jsonl."""
        with (self.folder / BAD_STEPS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _finite(value) for key, value in values.items()}) + "\n")

    def board(self, values: Mapping[str, Any]) -> None:
        """Show a step's values in TensorBoard."""
        for key, value in values.items():
            if key != "step" and _finite(value) is not None:
                self._board.add_scalar(GROUPS.get(key, key), value, values["step"])
        self._board.flush()

    def pictures(self, step: int, prompts: Sequence[str], sheet: Image.Image) -> Path:
        """Store a sheet of samples as samples/step-XXXXXXXX/grid.png, with prompts.json in its order, and show both in TensorBoard."""
        folder = self.folder / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / "grid.png")
        (folder / "prompts.json").write_text(json.dumps(list(prompts), indent=1), encoding="utf-8")
        self._board.add_image("samples/pictures", np.asarray(sheet.convert("RGB")), step, dataformats="HWC")
        self._board.add_text("samples/prompts", "\n".join(f"{i + 1}. {prompt}" for i, prompt in enumerate(prompts)), step)
        self._board.flush()
        return folder / "grid.png"

    def close(self) -> None:
        self._file.close()
        self._bad_samples.close()
        self._board.close()


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`; a line that a kill cut short is dropped too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: allocated on a CUDA device, else resident on the host. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def open_log(folder: Path, rank: int) -> logging.Handler:
    """Send what fusiontrain logs to logs/rank-N.log of the run folder, after what is there; returns the handler, to be closed.

    Raises UserError where the folder cannot be made or written to.
    """
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "logs" / f"rank-{rank}.log", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.dir: {folder} cannot be written to ({error.strerror}): give another folder") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("fusiontrain")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False  # the terminal belongs to the reporter
    logging.getLogger(__name__).info("process %d, rank %d", os.getpid(), rank)
    return handler


def close_log(handler: logging.Handler) -> None:
    """Undo `open_log`."""
    root = logging.getLogger("fusiontrain")
    root.removeHandler(handler)
    root.propagate = True
    handler.close()
