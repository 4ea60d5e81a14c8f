"""`fusiontrain checkpoint list|verify`: what a run has saved, and whether it is still what was written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusiontrain.cli.common import add_json_argument, print_json, print_table


def add_parser(subparsers: Any) -> None:
    """Adds `checkpoint` to the program's subparsers."""
    actions = subparsers.add_parser("checkpoint", help="list or verify checkpoints").add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    listing = actions.add_parser("list", help="the complete checkpoints of a run")
    verify = actions.add_parser("verify", help="compare every file with its checksum; exit 2 if one differs")
    for parser in (listing, verify):
        parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a run folder, its checkpoints folder, or one checkpoint")
        add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError where there is no checkpoint or one is damaged."""
    from fusiontrain.train.checkpoint import read_manifest, verify_checkpoint
    from fusiontrain.utils.errors import UserError

    checkpoints = find_checkpoints(Path(args.path))
    if args.action == "list":
        rows = [describe(path, read_manifest(path)) for path in checkpoints]
        if args.json:
            print_json({"checkpoints": rows})
        else:
            table = [[row["path"], row["step"], row["world_size"], row["mib"]] for row in rows]
            print_table([["checkpoint", "step", "ranks", "MiB"], *table])
        return 0
    problems = [problem for path in checkpoints for problem in verify_checkpoint(path)]
    if problems:
        raise UserError("\n".join(problems))
    if args.json:
        print_json({"checkpoints": [str(path) for path in checkpoints], "ok": True})
    else:
        print_table([[str(path), "ok"] for path in checkpoints])
    return 0


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path means, oldest first; UserError if there is none."""
    from fusiontrain.train.checkpoint import MANIFEST, list_checkpoints
    from fusiontrain.utils.errors import UserError

    if (path / MANIFEST).is_file():
        return [path]
    found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: no complete checkpoint there; give a run folder, or a folder such as checkpoints/step-00000100")
    return found


def describe(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """A row of the list."""
    size = sum(entry["size"] for entry in manifest["files"].values())
    return {
        "path": str(path),
        "step": manifest["step"],
        "world_size": manifest["world_size"],
        "mib": round(size / 2**20, 1),
        "recipe": manifest["model"]["recipe"],
    }
