"""Reading a checkpoint, after every file of it was checked."""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp

from fusiontrain.parallel.mesh import Ranks
from fusiontrain.parallel.reduce import gather_objects
from fusiontrain.train.checkpoint.manifest import DamagedCheckpoint, read_manifest
from fusiontrain.train.checkpoint.tensors import Tensors, alone, quiet
from fusiontrain.train.checkpoint.verify import verify_checkpoint
from fusiontrain.train.state import TrainState


def load_checkpoint(checkpoint: Path, tensors: Tensors, ranks: Ranks) -> TrainState:
    """Read a checkpoint into `tensors` in place, on any number of ranks, after checking every file; returns its state.

    All ranks call this together, and each checks its share of the files. Raises DamagedCheckpoint naming a file, before anything is loaded.
    """
    manifest = read_manifest(checkpoint)
    problems = [line for part in gather_objects(verify_checkpoint(checkpoint, ranks.rank, ranks.world_size)) for line in part]
    if problems:
        raise DamagedCheckpoint(f"{problems[0]}: the checkpoint is damaged, resume from another one with --resume PATH")
    with quiet():
        dcp.load({group: dict(part) for group, part in tensors.items()}, checkpoint_id=checkpoint, no_dist=alone())
    return TrainState.from_dict(manifest["state"])
