"""What a run writes about itself: one JSON object per step, trackers such as TensorBoard, and a log file per rank."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusiontrain.config.load import to_yaml
from fusiontrain.config.schema import Config
from fusiontrain.data.errors import REASONS
from fusiontrain.data.storage.shard import shown_source
from fusiontrain.generate.pictures import contact_sheet
from fusiontrain.train.by_source import source_labels
from fusiontrain.train.sinks.all import Sinks
from fusiontrain.train.step_values import Mixture, shown
from fusiontrain.utils.errors import UserError

METRICS_FILE = "metrics.jsonl"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
BAD_STEPS_FILE = "bad_steps.jsonl"


class MetricsWriter:
    """The metrics of one run folder, and of the trackers of `metrics.sinks`. Only the main rank has one."""

    def __init__(self, folder: Path, step: int, config: Config | None = None) -> None:
        """Continue a run after `step`: whatever the files hold of later steps is dropped. Without `config`: TensorBoard alone, and no sources."""
        self.folder, self.path = folder, folder / METRICS_FILE
        sources = config.data.sources if config is not None else ()
        self._labels = source_labels(sources)
        self._weights = {self._labels[shown_source(source.path)]: source.weight for source in sources}
        self._mixture = Mixture(tuple(self._labels.values()))
        truncate_metrics(self.path, step, self._mixture.add)
        bad_samples = folder / BAD_SAMPLES_FILE
        truncate_metrics(bad_samples, step)
        self._reasons = Counter(line["reason"] for line in read_metrics(bad_samples)) if bad_samples.exists() else Counter()
        self._bad_samples = bad_samples.open("a", encoding="utf-8")
        truncate_metrics(folder / BAD_STEPS_FILE, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._step = step
        self.sinks = Sinks(config.metrics.sinks if config is not None else ("tensorboard",), folder, step, config.model_dump(mode="json") if config else {})
        if config is not None:
            self.sinks.text(step, "run/config", f"```yaml\n{to_yaml(config)}\n```")
            self.sinks.text(step, "run/mixture", self._mixture.table(self._weights))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one step's values to metrics.jsonl; numbers that JSON has no word for (NaN, infinity) become null."""
        self._step = values["step"]
        self._mixture.add(values)
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
        """Show a step's values, which are written already, in the trackers, and each source's share of what was used so far."""
        self.sinks.scalars(values["step"], shown(values) | self._mixture.shares())

    def pictures(self, step: int, prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> Path:
        """Store samples ([H, W, 3] uint8) as one sheet, samples/step-XXXXXXXX/grid.png, with prompts.json in its order, and show them in the trackers."""
        folder, sheet = self.folder / "samples" / f"step-{step:08d}", contact_sheet(pictures, prompts)
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / "grid.png")
        (folder / "prompts.json").write_text(json.dumps(list(prompts), indent=1), encoding="utf-8")
        self.sinks.pictures(step, prompts, pictures, sheet)
        return folder / "grid.png"

    def close(self) -> None:
        """Close the files and the trackers, which may wait for what they have not sent yet."""
        self._file.close()
        self._bad_samples.close()
        if self._weights:
            self.sinks.text(self._step, "run/mixture", self._mixture.table(self._weights))
        self.sinks.close()


def truncate_metrics(path: Path, step: int, visit: Callable[[Mapping[str, Any]], None] = lambda line: None) -> None:
    """Keep the lines of metrics.jsonl up to `step`, and `visit` them; a line that a kill cut short is dropped too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            if values["step"] <= step:
                kept.append(line + "\n")
                visit(values)
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
