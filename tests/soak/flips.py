"""Damage every file of a checkpoint in many ways, one at a time: verify must find each, and loading must refuse each.

    python tests/soak/flips.py [CHECKPOINT] [--count 1000] [--seed 0]

Without a checkpoint it writes one with two ranks' worth of files and a copy of a base. A given one is copied first, so it stays as it is.
Exits with 1 and names what went unnoticed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from fusiontrain.parallel.mesh import Ranks
from fusiontrain.testing.damage import damages
from fusiontrain.train.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from fusiontrain.train.retention import Retention
from fusiontrain.train.state import TrainState
from fusiontrain.utils.errors import UserError


def write_checkpoint(folder: Path) -> Path:
    """A small checkpoint with every kind of file."""
    base = folder / "llama"
    base.mkdir(parents=True)
    save_file({"weight": torch.randn(20, 20)}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')
    tensors = {"model": {name: torch.randn(7, 11) for name in "abc"}, "optimizer": {f"{name}.step": torch.tensor(3.0) for name in "abc"}}
    state = TrainState(step=2, data={"window": 1}, tokens={"text": 5}, history={"loss": [0.1, 2.5e-7]})
    return save_checkpoint(folder / "checkpoints", state, tensors, {"recipe": "x", "tensors": {}}, "seed: 0\n", Ranks(), Retention(1), {}, base=base)


def unnoticed(checkpoint: Path, count: int, seed: int) -> tuple[list[str], Counter[str]]:
    """What verify or loading does not refuse with a sentence, and how often each file was damaged."""
    missed, files = [], Counter()
    reader = torch.distributed.checkpoint.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    for what, damaged in damages(checkpoint, count, seed):
        files[what.split()[0]] += 1
        with damaged:
            missed += [f"verify: {what}"] * (not _refused(lambda: _verify(checkpoint)))
            tensors: dict[str, dict[str, torch.Tensor]] = {}
            for name, entry in stored.items():
                group, _, rest = name.partition(".")
                tensors.setdefault(group, {})[rest] = torch.empty(entry.size, dtype=entry.properties.dtype)
            missed += [f"load: {what}"] * (not _refused(lambda tensors=tensors: load_checkpoint(checkpoint, tensors, Ranks())))
    if problems := verify_checkpoint(checkpoint):
        missed.append(f"the damage was not undone: {problems[0]}")
    return missed, files


def _verify(checkpoint: Path) -> None:
    problems = verify_checkpoint(checkpoint)
    if problems:
        raise UserError(problems[0])


def _refused(action) -> bool:
    try:
        action()
    except UserError as error:
        return "\n" not in str(error)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder)) if args.checkpoint is None else Path(shutil.copytree(args.checkpoint, Path(folder) / args.checkpoint.name))
        missed, files = unnoticed(checkpoint, args.count, args.seed)
    for name, number in sorted(files.items()):
        print(f"{number:6d} damages of {name}")
    print("\n".join(missed) or f"all {args.count} were found by verify and refused by loading")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
