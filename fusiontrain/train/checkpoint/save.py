"""Writing a checkpoint: the tensors of all ranks, their checksums, the manifest, the name."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from fusiontrain.parallel.mesh import Ranks
from fusiontrain.parallel.reduce import gather_objects
from fusiontrain.train.checkpoint.base import copy_base
from fusiontrain.train.checkpoint.durable import seal
from fusiontrain.train.checkpoint.folders import clear_leftovers, prune, publish, step_folder
from fusiontrain.train.checkpoint.manifest import CONFIG, write_manifest
from fusiontrain.train.checkpoint.tensors import METADATA, Tensors, alone, quiet
from fusiontrain.train.checkpoint.writer import CopyingPlanner, SealingWriter
from fusiontrain.train.retention import Retention
from fusiontrain.train.state import TrainState
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUT_OF_TIME = re.compile(r"timed? ?out", re.IGNORECASE)
"""What gloo says when a rank waits too long for another."""
FULL_DISK = re.compile(r"inline_container.* unexpected pos|no space left", re.IGNORECASE)
"""What torch's file format says where a write took fewer bytes than it was given."""
FORBIDDEN = re.compile(r"read-only file system|permission denied|not permitted", re.IGNORECASE)


def save_checkpoint(
    checkpoints: Path,
    state: TrainState,
    tensors: Tensors,
    model: Mapping[str, Any],
    config_text: str,
    ranks: Ranks,
    keep: Retention,
    metrics: Mapping[str, float],
    group: dist.ProcessGroup | None = None,
    released: Callable[[], None] = lambda: None,
    base: Path | None = None,
) -> Path:
    """Write `state` and `tensors` of all ranks as one checkpoint, then delete those that `keep` has no reason for.

    model: from `model_identity`. metrics: what is known of the step, for the choice of the best. group: of all ranks, the default one if None.
    released: called when the tensors of this rank may change again, which is before the disk has them. base: a folder to be copied too.
    All ranks call this together. Returns the checkpoint's folder. Raises UserError, on all ranks, where one cannot write, such as on a full disk;
    the checkpoints before it stay as they are.
    """
    final = step_folder(checkpoints, state.step)
    partial = final.with_name(final.name + ".tmp")
    writer = SealingWriter(partial, ranks.rank, released)

    def prepare() -> None:
        clear_leftovers(checkpoints)
        partial.mkdir(parents=True)

    def finish(files: Mapping[str, Any]) -> None:
        facts = {"model": model, "metrics": metrics, "state": state.to_dict(), "world_size": ranks.world_size}
        (partial / CONFIG).write_text(config_text, encoding="utf-8")
        shared = seal([partial / CONFIG, partial / METADATA]) | ({} if base is None else copy_base(base, partial))
        write_manifest(partial, {"files": {**files, **shared}, **facts})
        publish(partial, final)

    try:
        _on_main(prepare, ranks, group)
        with quiet():
            stored = {name: dict(part) for name, part in tensors.items()}
            dcp.save(stored, storage_writer=writer, planner=CopyingPlanner(), process_group=group, no_dist=alone())
        files = {name: entry for part in gather_objects(writer.files, group) for name, entry in part.items()}
        _on_main(lambda: finish(files), ranks, group)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        logger.exception("saving %s", final)
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # on a full disk it would be in the way of the next try
        raise UserError(_in_words(final, error)) from error
    if ranks.is_main:
        try:
            prune(checkpoints, keep)
        except OSError as error:  # this one is complete all the same, and the next save tries again
            logger.warning("%s: older checkpoints cannot be deleted (%s)", checkpoints, error)
    logger.info("saved %s", final)
    return final


def _on_main(action: Callable[[], None], ranks: Ranks, group: dist.ProcessGroup | None) -> None:
    """Run `action` on the main rank while the others wait; its OSError is raised on all."""
    failure: OSError | None = None
    if ranks.is_main:
        try:
            action()
        except OSError as error:
            failure = error
    for one in gather_objects(failure, group):
        if one is not None:
            raise one


def _in_words(checkpoint: Path, error: BaseException) -> str:
    """torch reports a full disk as a RuntimeError of its file format, or wrapped with the failures of all ranks."""
    if isinstance(error, dcp.CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        what = f"rank {rank}: {cause}"
    else:
        what = str(error)
    if OUT_OF_TIME.search(what):
        return (
            f"{checkpoint}: cannot be saved (a rank waited longer for another than checkpoint.timeout_seconds): the checkpoints before it are complete, look "
            "at the storage, or raise that, and run the same command again"
        )
    if FULL_DISK.search(what):
        what = "No space left on device"
    existing = next(folder for folder in checkpoint.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free / 2**20
    remedy = "let this user write there" if FORBIDDEN.search(what) else "make room"
    return (
        f"{checkpoint}: cannot be saved ({what.splitlines()[0]}; {free:,.0f} MiB are free there): the checkpoints before it are complete, "
        f"{remedy} and run the same command again"
    )
