"""Sharded checkpoints that are complete or do not exist.

A checkpoint is the folder `step-00000100/`:
    *.distcp, .metadata   the tensors, written by torch.distributed.checkpoint, each rank its own shards
    config.yaml           the resolved config, so that the folder alone is enough to sample from
    base/                 with `checkpoint.frozen: copy`, the folder of the model that the run started from
    manifest.json         size and checksum of every file above, the model's identity, the run's state, versions; last to be written

It is written as `step-00000100.tmp/` and renamed when the manifest is on disk, so a run that dies while saving leaves the previous
checkpoint as it was. torch's format has no checksums of its own: a flipped byte would load silently.
"""

from fusiontrain.train.checkpoint.folders import checkpoint_step, list_checkpoints, prune, resume_candidates, set_aside_newer, step_folder
from fusiontrain.train.checkpoint.load import load_checkpoint
from fusiontrain.train.checkpoint.manifest import CONFIG, FORMAT_VERSION, MANIFEST, DamagedCheckpoint, read_manifest
from fusiontrain.train.checkpoint.save import save_checkpoint
from fusiontrain.train.checkpoint.tensors import Tensors
from fusiontrain.train.checkpoint.verify import foreign_files, verify_checkpoint

__all__ = [
    "CONFIG",
    "FORMAT_VERSION",
    "MANIFEST",
    "DamagedCheckpoint",
    "Tensors",
    "checkpoint_step",
    "foreign_files",
    "list_checkpoints",
    "load_checkpoint",
    "prune",
    "read_manifest",
    "resume_candidates",
    "save_checkpoint",
    "set_aside_newer",
    "step_folder",
    "verify_checkpoint",
]
