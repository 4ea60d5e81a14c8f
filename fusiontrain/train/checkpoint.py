"""Sharded checkpoints that are complete or do not exist.

A checkpoint is the folder `step-00000100/`:
    *.distcp, .metadata   the tensors, written by torch.distributed.checkpoint, each rank its own shards
    config.yaml           the resolved config, so that the folder alone is enough to sample from
    manifest.json         size and sha256 of every file above, the model's identity, the run's state, versions; last to be written

It is written as `step-00000100.tmp/` and renamed when the manifest is on disk, so a run that dies while saving leaves the previous
checkpoint as it was. torch's format has no checksums of its own: a flipped byte would load silently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import fusiontrain
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.parallel.reduce import barrier, gather_objects
from fusiontrain.train.identity import sha256_of
from fusiontrain.train.retention import Retention, superfluous
from fusiontrain.train.state import TrainState
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
FORMAT_VERSION = 2
STEP_FOLDER = re.compile(r"step-(\d{8,})")

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""{"model": {name: tensor}, "optimizer": {name.key: tensor}}"""


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or is not what was written. All ranks that check together find the same."""


def step_folder(checkpoints: Path, step: int) -> Path:
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
    """What `resume` (auto, none, or a folder) means for a run whose checkpoints lie in `checkpoints`, best first; empty = start anew."""
    if resume == "none":
        return []
    if resume == "auto":
        return list_checkpoints(checkpoints)[::-1]
    path = Path(resume)
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path}: no complete checkpoint there ({MANIFEST} is missing): give a folder such as {checkpoints}/step-00000100")
    return [path]


def save_checkpoint(
    checkpoints: Path,
    state: TrainState,
    tensors: Tensors,
    model: Mapping[str, Any],
    config_text: str,
    ranks: Ranks,
    keep: Retention,
    metrics: Mapping[str, float],
) -> Path:
    """Write `state` and `tensors` of all ranks as one checkpoint, then delete those that `keep` has no reason for.

    model: from `model_identity`. metrics: what is known of the step, for the choice of the best. All ranks call this together. Returns the
    checkpoint's folder. Raises UserError where the tensors cannot be written, such as on a full disk; the checkpoints before it stay as they are.
    """
    final = step_folder(checkpoints, state.step)
    partial = final.with_name(final.name + ".tmp")
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_durably(partial / CONFIG, config_text)
    barrier()
    with _quiet(), _named_failure(final):
        dcp.save({group: dict(part) for group, part in tensors.items()}, checkpoint_id=partial, no_dist=_alone())
    gathered = gather_objects(_describe_files(partial, ranks))
    if ranks.is_main:
        files = {name: entry for part in gathered for name, entry in part.items()}
        facts = {"model": model, "metrics": metrics, "state": state.to_dict(), "world_size": ranks.world_size}
        _write_manifest(partial, {"files": files, **facts})
        _publish(partial, final)
        prune(checkpoints, keep)
    barrier()
    logger.info("saved %s", final)
    return final


@contextlib.contextmanager
def _named_failure(checkpoint: Path) -> Iterator[None]:
    """torch reports a full disk as a RuntimeError of its file format, or wrapped with the failures of all ranks."""
    try:
        yield
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        logger.exception("saving %s", checkpoint)
        free = shutil.disk_usage(checkpoint.parent).free / 2**20
        raise UserError(
            f"{checkpoint}: cannot be saved ({str(error).splitlines()[0]}; {free:,.0f} MiB are free there): the checkpoints before it are complete, "
            "make room and run the same command again"
        ) from error


def load_checkpoint(checkpoint: Path, tensors: Tensors, ranks: Ranks) -> TrainState:
    """Read a checkpoint into `tensors` in place, on any number of ranks, after checking every file; returns its state.

    All ranks call this together, and each checks its share of the files. Raises DamagedCheckpoint naming a file, before anything is loaded.
    """
    manifest = read_manifest(checkpoint)
    problems = [line for part in gather_objects(verify_checkpoint(checkpoint, ranks.rank, ranks.world_size)) for line in part]
    if problems:
        raise DamagedCheckpoint(f"{problems[0]}: the checkpoint is damaged, resume from another one with --resume PATH")
    with _quiet():
        dcp.load({group: dict(part) for group, part in tensors.items()}, checkpoint_id=checkpoint, no_dist=_alone())
    return TrainState.from_dict(manifest["state"])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises DamagedCheckpoint where it is missing or damaged, UserError where it is of a newer format."""
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        digest = manifest.pop("sha256")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{checkpoint}: no complete checkpoint there ({MANIFEST} is missing)") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: is not readable, the checkpoint is damaged: use another one") from error
    if digest != _digest(manifest):
        raise DamagedCheckpoint(f"{path}: does not match its own checksum, the checkpoint is damaged: use another one")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: has format {manifest['format_version']}, this version reads {FORMAT_VERSION}: update fusiontrain")
    return manifest


def verify_checkpoint(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Compare size and sha256 of the files with the manifest; one sentence per problem, an empty list where all is well.

    part, parts: check only every `parts`-th file, starting with number `part`.
    """
    problems = []
    for name, entry in list(read_manifest(checkpoint)["files"].items())[part::parts]:
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{path}: is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{path}: has {path.stat().st_size} bytes instead of {entry['size']}")
        elif sha256_of(path) != entry["sha256"]:
            problems.append(f"{path}: does not match its sha256")
    return problems


def foreign_files(checkpoint: Path) -> list[str]:
    """A sentence for every file in the folder that the manifest does not name. They do no harm to a resume, but nobody wrote them there."""
    known = {MANIFEST, *read_manifest(checkpoint)["files"]}
    return [f"{path}: does not belong to the checkpoint" for path in sorted(checkpoint.iterdir()) if path.name not in known]


def set_aside_newer(checkpoints: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps than `step` to `*.stale`, and return them.

    A run that goes back leaves the future it had; without this, the next `--resume auto` would jump into it.
    """
    stale = []
    for path in list_checkpoints(checkpoints):
        if checkpoint_step(path) > step:
            target = path.with_name(path.name + ".stale")
            shutil.rmtree(target, ignore_errors=True)
            stale.append(path.rename(target))
    return stale


def _alone() -> bool:
    return not torch.distributed.is_initialized()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns at every save that a world of one does not communicate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
        yield


def _describe_files(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the files that this rank wrote; the main rank also describes what belongs to all."""
    names = sorted(path.name for path in folder.glob(f"__{ranks.rank}_*"))
    if ranks.is_main:
        names += [CONFIG, ".metadata"]
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    versions = {"fusiontrain": fusiontrain.__version__, "torch": torch.__version__, "python": platform.python_version()}
    manifest = {"format_version": FORMAT_VERSION, "step": content["state"]["step"], "versions": versions, **content}
    manifest = json.loads(json.dumps(manifest))
    _write_durably(folder / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name, in one step; a checkpoint of the same step is replaced."""
    _sync_folder(partial)
    if final.exists():
        replaced = final.with_name(final.name + ".replaced.tmp")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(checkpoints: Path, keep: Retention, dry_run: bool = False) -> list[Path]:
    """Delete the checkpoints that `keep` has no reason for and what unfinished saves left behind; returns the former. A folder loses its name
    first, so it is never half there."""
    numbered = [(checkpoint_step(path), path) for path in list_checkpoints(checkpoints)]
    gone = superfluous(numbered, keep, _metrics_of)
    if dry_run:
        return gone
    for path in gone:
        path.rename(path.with_name(path.name + ".tmp"))
    for path in checkpoints.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    return gone


def _metrics_of(checkpoint: Path) -> Mapping[str, float]:
    try:
        return read_manifest(checkpoint)["metrics"]
    except UserError:  # damaged: no reason to keep it, and none to end the run
        return {}
