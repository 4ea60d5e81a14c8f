"""What is measured of a finished training. What takes a model is kept in the run folder, so that a table is made again without it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusiontrain.generate.score import judge_model
from fusiontrain.studies.ground import Ground
from fusiontrain.studies.step_matching import match_steps
from fusiontrain.studies.text_drift import text_drift
from fusiontrain.train.inference import load_for_inference

LAST = 0.1
"""Training losses are means over this last share of the steps."""


@dataclass(frozen=True)
class Finished:
    """A training that has come to its end, and its lines of metrics.jsonl."""

    run: Path
    rows: list[dict[str, Any]]
    ground: Ground
    judged: int

    @property
    def processes(self) -> int:
        """Ranks that trained it; the most, where it went on with another number of them."""
        return len(list((self.run / "logs").glob("rank-*.log")))

    def curve(self, key: str) -> list[float]:
        """The values of a key over all steps that have one."""
        return [row[key] for row in self.rows if row.get(key) is not None]


def measure(column: str, finished: Finished, baseline: Finished | None) -> float | None:
    """The value of a table's column; None where the training has none. Columns:

    `validation/text`, `validation/image`   at the end                 `loss/text`, `loss/image`    mean over the last tenth of the steps
    `slope/text`, `slope/image`             see `step_matching.py`     `reached/text`, `reached/image`   share of the baseline's losses matched
    and the same of `speech`
    `step time`                             median seconds of a step over the baseline's
    `text drift`                            see `text_drift.py`        `color`, `shape`, `place`, `caption`   shares right, by the world's judge
    """
    kind, _, name = column.partition("/")
    if kind == "validation":
        curve = finished.curve(column)
        return curve[-1] if curve else None
    if kind == "loss":
        curve = finished.curve(column)
        return statistics.fmean(curve[-max(1, round(len(curve) * LAST)) :]) if curve else None
    if kind in ("slope", "reached"):
        match = None if baseline is None else match_steps(baseline.curve(f"loss/{name}"), finished.curve(f"loss/{name}"))
        return None if match is None else match.slope if kind == "slope" else match.reached
    if column == "step time":
        return None if baseline is None else _step_seconds(finished) / _step_seconds(baseline)
    if column == "text drift":
        return _kept(finished, "text_drift", lambda: {"loss": text_drift(finished.run, finished.ground.llama).loss})["loss"]
    return _kept(finished, "scores", lambda: _scores(finished)).get(f"{column}_accuracy")


def _step_seconds(finished: Finished) -> float:
    return statistics.median(finished.curve("step_seconds"))


def _scores(finished: Finished) -> dict[str, float]:
    trained = load_for_inference(finished.run)
    return judge_model(trained.model, trained.tokenizer, trained.config, finished.ground.world, finished.judged, finished.ground.seed).summary


def _kept(finished: Finished, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    path = finished.run / f"{name}-{finished.rows[-1]['step']:08d}.json"
    if not path.is_file():
        path.write_text(json.dumps(make()) + "\n")
    return json.loads(path.read_text())
