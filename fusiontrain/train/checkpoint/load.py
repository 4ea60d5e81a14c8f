"""Reading a checkpoint, and checking every file of it in the same pass."""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp

from fusiontrain.parallel.mesh import Ranks
from fusiontrain.parallel.reduce import gather_objects
from fusiontrain.train.checkpoint.durable import CHECKSUM
from fusiontrain.train.checkpoint.manifest import DamagedCheckpoint, read_manifest
from fusiontrain.train.checkpoint.reader import CheckingReader
from fusiontrain.train.checkpoint.tensors import TENSOR_FILES, Tensors, alone, quiet
from fusiontrain.train.checkpoint.verify import CHANGED, changed, missing_or_short
from fusiontrain.train.state import TrainState

LARGE = (TENSOR_FILES, ".safetensors")


def load_checkpoint(checkpoint: Path, tensors: Tensors, ranks: Ranks) -> TrainState:
    """Read a checkpoint into `tensors` in place, on any number of ranks, and check every file; returns its state.

    All ranks call this together, and each checks its share of the files. Raises DamagedCheckpoint naming a file, on all ranks. Files that are
    missing or short, and all that are not tensors, are found before anything is loaded; the large ones are read once, to be checked and loaded
    at the same time, so after a DamagedCheckpoint `tensors` may hold anything: load another checkpoint into them, or drop them.
    """
    manifest = read_manifest(checkpoint)
    files = sorted(manifest["files"].items())
    small = [file for file in files if not file[0].endswith(LARGE)]
    large = [file for file in files if file[0].endswith(LARGE)]
    absent = [problem for name, entry in files if (problem := missing_or_short(checkpoint, name, entry))]
    _require_sound(absent or changed(checkpoint, small))
    share = dict(large[ranks.rank :: ranks.world_size])
    reader, failure = CheckingReader(checkpoint, share), None
    try:
        with quiet():
            stored = {group: dict(part) for group, part in tensors.items()}
            dcp.load(stored, storage_reader=reader, no_dist=alone())
    except (Exception, dcp.CheckpointException) as error:  # whatever damaged bytes may make of torch's readers
        failure = error
    found = [f"{checkpoint / name}: {CHANGED}" for name, checksum in reader.checksums.items() if checksum != share[name][CHECKSUM]]
    _require_sound(found + changed(checkpoint, [(name, entry) for name, entry in share.items() if name not in reader.checksums]))
    if failure is not None:
        raise failure
    return TrainState.from_dict(manifest["state"])


def _require_sound(problems: list[str]) -> None:
    """Raise DamagedCheckpoint on all ranks for the first problem of any."""
    everyone = [line for part in gather_objects(problems) for line in part]
    if everyone:
        raise DamagedCheckpoint(everyone[0])
