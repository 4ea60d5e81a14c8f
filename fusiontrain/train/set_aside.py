"""What a run leaves behind that goes back: checkpoints, metrics and samples of a future that is no longer its own keep lying there as `*.stale`."""

from __future__ import annotations

import shutil
from pathlib import Path

from fusiontrain.train.checkpoint import checkpoint_step, list_checkpoints, set_aside_newer
from fusiontrain.train.checkpoint.folders import STEP_FOLDER, stale_name
from fusiontrain.train.metrics import BAD_SAMPLES_FILE, BAD_STEPS_FILE, METRICS_FILE, truncate_metrics

LINES = (METRICS_FILE, BAD_SAMPLES_FILE, BAD_STEPS_FILE)


def set_aside_future(run: Path, step: int, why: str) -> list[str]:
    """Set aside what a run folder holds of steps later than `step`; one sentence of it, which `why` begins, or none where there was nothing.

    With a step but no checkpoint behind it nothing is done: lines of metrics behind it are of steps that a kill took and that are trained again.
    """
    later = [path for path in list_checkpoints(run / "checkpoints") if checkpoint_step(path) > step]
    if step and not later:
        return []
    lines = [name for name in LINES if _set_aside_lines(run / name, step)]
    samples = [path for path in (run / "samples").glob("step-*") if STEP_FOLDER.fullmatch(path.name) and checkpoint_step(path) > step]
    for path in samples:
        path.rename(stale_name(path))
    set_aside_newer(run / "checkpoints", step)  # last: a start that is cut short before this does all of it again
    parts = [f"{len(later)} checkpoint{'s' if len(later) > 1 else ''}"] * bool(later) + ["lines of metrics"] * bool(lines) + ["samples"] * bool(samples)
    if not parts:
        return []
    return [f"{why}: what {run} held ({', '.join(parts)}) is set aside under names that end in .stale: rename it to go back to it, or delete it"]


def _set_aside_lines(path: Path, step: int) -> bool:
    """Cut a file of metrics to `step`, and keep a copy of all of it if that took lines away."""
    if not path.exists():
        return False
    copy, before = stale_name(path), path.stat().st_size
    shutil.copyfile(path, copy)
    truncate_metrics(path, step)
    if path.stat().st_size == before:
        copy.unlink()
        return False
    return True
