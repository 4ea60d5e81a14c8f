"""MLflow: server and experiment are those of its own environment variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MOST_PARAMS, LONGEST_PARAM = 100, 500
"""Of a call, and characters of a value: limits of MLflow's servers."""


class MLflowRuns:
    """A run named after the run folder; without MLFLOW_TRACKING_URI it is kept in the run folder's `mlruns`."""

    name, remote = "mlflow", True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, run_id: str | None, config: Mapping[str, Any]) -> str | None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (self.folder / "mlruns").resolve().as_uri())
        if run_id is not None:
            self._client.get_run(run_id)
            self._client.update_run(run_id, status="RUNNING")
            self._id = run_id
            return run_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fusiontrain")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment_id, run_name=self.folder.resolve().name).info.run_id
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in _flat(config)]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + MOST_PARAMS])
        return self._id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(tag, value, now, step) for tag, value in values.items()])

    def pictures(self, step: int, prompts: Sequence[str], pictures: Sequence[np.ndarray], sheet: Image.Image) -> None:
        self._client.log_image(self._id, np.asarray(sheet.convert("RGB")), key="samples/pictures", step=step)
        self._client.log_text(self._id, "\n".join(prompts), f"samples/prompts-{step:08d}.txt")

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._client.log_text(self._id, markdown, f"{tag}.md")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
