"""Writing a checkpoint: the tensors of all ranks, their checksums, the manifest, the name."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from fusiontrain.parallel.mesh import Ranks
from fusiontrain.parallel.reduce import barrier, gather_objects
from fusiontrain.train.checkpoint.durable import write_durably
from fusiontrain.train.checkpoint.folders import prune, publish, step_folder
from fusiontrain.train.checkpoint.manifest import CONFIG, write_manifest
from fusiontrain.train.checkpoint.tensors import Tensors, alone, quiet
from fusiontrain.train.identity import sha256_of
from fusiontrain.train.retention import Retention
from fusiontrain.train.state import TrainState
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)


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
        write_durably(partial / CONFIG, config_text)
    barrier()
    with quiet(), _named_failure(final):
        dcp.save({group: dict(part) for group, part in tensors.items()}, checkpoint_id=partial, no_dist=alone())
    gathered = gather_objects(_describe_files(partial, ranks))
    if ranks.is_main:
        files = {name: entry for part in gathered for name, entry in part.items()}
        facts = {"model": model, "metrics": metrics, "state": state.to_dict(), "world_size": ranks.world_size}
        write_manifest(partial, {"files": files, **facts})
        publish(partial, final)
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


def _describe_files(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the files that this rank wrote; the main rank also describes what belongs to all."""
    names = sorted(path.name for path in folder.glob(f"__{ranks.rank}_*"))
    if ranks.is_main:
        names += [CONFIG, ".metadata"]
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
