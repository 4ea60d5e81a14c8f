"""The checkpoints of a run as folders: which are complete, which one to resume from, which may go."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from fusiontrain.train.checkpoint.durable import sync
from fusiontrain.train.checkpoint.manifest import MANIFEST, read_manifest
from fusiontrain.train.retention import Retention, superfluous
from fusiontrain.utils.errors import UserError

STEP_FOLDER = re.compile(r"step-(\d{8,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest step first. Unfinished and set-aside ones are not among them."""
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.iterdir() if STEP_FOLDER.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = STEP_FOLDER.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint}: is not a checkpoint: give a folder named step-00000100 with a {MANIFEST}")
    return int(match.group(1))


def resume_candidates(resume: str, checkpoints: Path) -> list[Path]:
    """What `resume` (auto, none, or a folder) means for a run whose checkpoints lie in `checkpoints`, best first; empty = start anew.

    A folder is a checkpoint, or a run whose newest one is meant. Raises UserError where it is neither.
    """
    if resume == "none":
        return []
    if resume == "auto":
        return list_checkpoints(checkpoints)[::-1]
    path = Path(resume)
    if not (path / MANIFEST).is_file():
        if resume and (of_run := list_checkpoints(path / "checkpoints")):
            return of_run[::-1]
        raise UserError(f"{path}: no complete checkpoint there ({MANIFEST} is missing): give a folder such as {checkpoints}/step-00000100")
    return [path]


def set_aside_newer(checkpoints: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps than `step` to `*.stale`, and return them. None that was set aside before is lost: names are counted up.

    A run that goes back leaves the future it had; without this, the next `--resume auto` would jump into it.
    """
    return [path.rename(stale_name(path)) for path in list_checkpoints(checkpoints) if checkpoint_step(path) > step]


def stale_name(path: Path) -> Path:
    """The first free name that a file or folder can be set aside under."""
    endings = itertools.chain([".stale"], (f".stale-{number}" for number in itertools.count(2)))
    return next(free for free in (path.with_name(path.name + ending) for ending in endings) if not free.exists())


def incomplete(checkpoints: Path) -> list[Path]:
    """Folders of checkpoints that are being written or deleted, or whose save or deletion did not end: `*.tmp`, and those without a manifest."""
    folders = (path for path in checkpoints.glob("step-*") if path.is_dir()) if checkpoints.is_dir() else ()
    return sorted(
        path for path in folders if path.name.endswith(".tmp") or (STEP_FOLDER.fullmatch(path.name) and not (path / MANIFEST).is_file())
    )


def set_aside(checkpoints: Path) -> list[Path]:
    """Checkpoints that `set_aside_newer` renamed."""
    return sorted(path for path in checkpoints.glob("step-*.stale*") if path.is_dir())


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name, in one step; a checkpoint of the same step is replaced."""
    sync(partial)
    if final.exists():
        replaced = final.with_name(final.name + ".replaced.tmp")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(final)
    sync(final.parent)


def prune(checkpoints: Path, keep: Retention, dry_run: bool = False) -> list[Path]:
    """Delete the checkpoints that `keep` has no reason for, and return them. A folder loses its name first, so it is never half there."""
    numbered = [(checkpoint_step(path), path) for path in list_checkpoints(checkpoints)]
    gone = superfluous(numbered, keep, metrics_of)
    if not dry_run:
        for path in gone:
            shutil.rmtree(path.rename(path.with_name(path.name + ".tmp")), ignore_errors=True)
    return gone


def clear_leftovers(checkpoints: Path) -> None:
    """Delete what saves and deletions left behind that did not end. Only a run that is not saving may call this."""
    for path in checkpoints.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def metrics_of(checkpoint: Path) -> Mapping[str, float]:
    """What the run's metrics were at the step of a checkpoint; empty for a damaged one."""
    try:
        return read_manifest(checkpoint)["metrics"]
    except UserError:  # damaged: no reason to keep it, and none to end the run
        return {}
