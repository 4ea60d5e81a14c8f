"""`fusiontrain checkpoint list|verify|prune|export|import`: what a run has saved, whether it is still what was written, and what of it may go."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from fusiontrain.cli import checkpoint_folders
from fusiontrain.cli.common import add_json_argument, print_json, print_table


def add_parser(subparsers: Any) -> None:
    """Adds `checkpoint` to the program's subparsers."""
    actions = subparsers.add_parser("checkpoint", help="list, verify, prune, export or import checkpoints").add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    listing = actions.add_parser("list", help="the checkpoints of a run: complete ones, and by name those that are not or were set aside")
    verify = actions.add_parser("verify", help="compare every file with its checksum; exit 2 if one differs")
    prune = actions.add_parser("prune", help="delete checkpoints that the run's config would not keep")
    prune.add_argument("--keep-last", type=int, metavar="N", help="instead of checkpoint.keep_last")
    prune.add_argument("--keep-every", type=int, metavar="STEPS", help="instead of checkpoint.keep_every")
    prune.add_argument("--keep-best", metavar="KEY", help="instead of checkpoint.keep_best, e.g. validation/image")
    prune.add_argument("--dry-run", action="store_true", help="say what would go, and delete nothing")
    for parser in (listing, verify, prune):
        parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a run folder, its checkpoints folder, or one checkpoint")
        add_json_argument(parser)
    checkpoint_folders.add_parsers(actions)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError where there is no checkpoint or one is damaged."""
    if args.action in checkpoint_folders.ACTIONS:
        return checkpoint_folders.run(args)
    from fusiontrain.utils.errors import UserError

    checkpoints = find_checkpoints(Path(args.path))
    if args.action == "list":
        return _list(args, checkpoints)
    if args.action == "prune":
        return _prune(args, checkpoints)
    problems = [problem for path in checkpoints for problem in _problems(path)]
    if problems:
        raise UserError("\n".join(problems))
    if args.json:
        print_json({"checkpoints": [str(path) for path in checkpoints], "ok": True})
    else:
        print_table([[str(path), "ok"] for path in checkpoints])
    return 0


def _list(args: argparse.Namespace, checkpoints: list[Path]) -> int:
    """Exit code 0; a damaged one is told on stderr, among the others, and is 2."""
    from fusiontrain.train.checkpoint import MANIFEST, DamagedCheckpoint, read_manifest
    from fusiontrain.train.checkpoint.folders import incomplete, set_aside
    from fusiontrain.utils.errors import UserError

    rows, damaged = [], []
    for path in checkpoints:
        try:
            rows.append(describe(path, read_manifest(path)))
        except DamagedCheckpoint as error:
            damaged.append(str(error))
    alone = (Path(args.path) / MANIFEST).is_file()
    unfinished, aside = ([], []) if alone else ([str(path) for path in find(checkpoints[0].parent)] for find in (incomplete, set_aside))
    if args.json:
        print_json({"checkpoints": rows, "damaged": damaged, "incomplete": unfinished, "set_aside": aside})
    else:
        table = [[row["path"], row["step"], row["world_size"], row["mib"]] for row in rows]
        print_table([["checkpoint", "step", "ranks", "MiB"], *table])
        for name in unfinished:
            print(f"{name}: incomplete (its save or deletion is under way, or did not end); no run resumes from it")
        for name in aside:
            print(f"{name}: set aside when the run went back; delete it when you no longer need it")
    if damaged:
        raise UserError("\n".join(damaged))
    return 0


def _problems(checkpoint: Path) -> list[str]:
    from fusiontrain.train.checkpoint import DamagedCheckpoint, foreign_files, verify_checkpoint

    try:
        return [*verify_checkpoint(checkpoint), *foreign_files(checkpoint)]
    except DamagedCheckpoint as error:
        return [error.fact]


def _prune(args: argparse.Namespace, checkpoints: list[Path]) -> int:
    from dataclasses import replace

    from fusiontrain.config.load import load
    from fusiontrain.train.checkpoint import CONFIG, list_checkpoints, prune
    from fusiontrain.train.retention import Retention
    from fusiontrain.utils.errors import UserError

    asked = {"last": args.keep_last, "every": args.keep_every, "best": args.keep_best}
    if any(number is not None and number < 1 for number in (args.keep_last, args.keep_every)):
        raise UserError("--keep-last and --keep-every: must be at least 1")
    keep = Retention.of(load(checkpoints[-1] / CONFIG).checkpoint)
    keep = replace(keep, **{name: value for name, value in asked.items() if value is not None})
    _require_metric(checkpoints[-1].parent, keep.best, "--keep-best" if args.keep_best is not None else "checkpoint.keep_best")
    _require_sound(list_checkpoints(checkpoints[-1].parent), prune(checkpoints[-1].parent, keep, dry_run=True))
    gone = [str(path) for path in prune(checkpoints[-1].parent, keep, dry_run=args.dry_run)]
    if args.json:
        print_json({"deleted": gone, "dry_run": args.dry_run})
    else:
        print_table([[path, "would be deleted" if args.dry_run else "deleted"] for path in gone] or [["nothing to delete"]])
    return 0


def _require_sound(checkpoints: list[Path], gone: list[Path]) -> None:
    """Raise UserError where every checkpoint that would stay is damaged and one that would go may not be."""
    from fusiontrain.utils.errors import UserError

    problems: list[str] = []
    for path in (path for path in reversed(checkpoints) if gone and path not in gone):
        found = _problems(path)
        if not found:
            return
        problems += found
    if problems:
        raise UserError(
            f"{problems[0]}: of the checkpoints that would stay none is sound, so nothing is deleted: look at all with `fusiontrain checkpoint verify`, and "
            "delete the damaged ones by hand"
        )


def _require_metric(folder: Path, key: str | None, where: str) -> None:
    """Raise UserError where no checkpoint has the metric by which the best one is to be kept: it would go with the others, in silence."""
    from fusiontrain.train.checkpoint.folders import list_checkpoints, metrics_of
    from fusiontrain.utils.errors import UserError

    known = {name for path in list_checkpoints(folder) for name in metrics_of(path)}
    if key is None or key in known:
        return
    losses = sorted(name for name in known if name == "loss" or name.startswith("validation/"))
    hint = difflib.get_close_matches(key, known, n=1) or losses
    raise UserError(
        f"{where} {key}: no checkpoint in {folder} has a value of that name, so the best one is not known and nothing is deleted: "
        + (f"give one that they have, such as {' or '.join(hint)}" if hint else "they have no values at all, leave it out")
    )


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path means, oldest first; UserError if there is none."""
    from fusiontrain.train.checkpoint import MANIFEST, list_checkpoints
    from fusiontrain.train.checkpoint.folders import incomplete
    from fusiontrain.utils.errors import UserError

    if (path / MANIFEST).is_file():
        return [path]
    found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        rest = ", ".join(left.name for left in (incomplete(path) or incomplete(path / "checkpoints")))
        aside = f" (incomplete: {rest})" if rest else ""
        raise UserError(f"{path}: no complete checkpoint there{aside}; give a run folder, or a folder such as checkpoints/step-00000100")
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
