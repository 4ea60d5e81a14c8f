"""`fusiontrain evaluate`: validation losses of a checkpoint, and on the demo world the judge's scores."""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontrain.cli.common import add_json_argument, note, print_json, print_table
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.config.schema import Config


def add_parser(subparsers: Any) -> None:
    """Adds `evaluate` to the program's subparsers."""
    parser = subparsers.add_parser("evaluate", help="validation losses, and the judge's scores on the demo world")
    parser.add_argument("checkpoint", help="a checkpoint, an exported folder, or a run folder (its newest checkpoint)")
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="other data and settings than the checkpoint's own")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values to use instead, such as evaluate.batches=50")
    parser.add_argument("--judge", type=int, default=64, metavar="N", help="pictures painted and captioned where the data are a demo world (default: 64)")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights (train.ema_decay)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for bad input."""
    from fusiontrain.data.loader import Loader
    from fusiontrain.parallel.mesh import Ranks
    from fusiontrain.train.evaluate import validation_losses
    from fusiontrain.train.inference import load_for_inference

    trained = load_for_inference(args.checkpoint, args.ema)
    config = _config(args, trained.checkpoint, trained.config)
    if not config.data.validation_sources:
        raise UserError("data.validation_sources: is empty, there is nothing to evaluate on: give it as an override")
    with contextlib.closing(Loader(config, trained.tokenizer, "validation", 0, 1)) as loader:
        losses = validation_losses(trained.model, loader, config.evaluate.batches, Ranks().device)
    report: dict[str, Any] = {
        "checkpoint": str(trained.checkpoint),
        "validation": {name: loss for name, loss in losses.items() if math.isfinite(loss)},
    }
    world = _demo_world(config)
    if world is not None and trained.model.image is None and args.judge > 0:
        what = "its images are codes, which nothing here makes pictures of" if trained.writes_codes else "it has no images"
        note(f"no scores of the judge: the model paints no pictures, for {what}")
    elif world is not None and args.judge > 0:
        from fusiontrain.generate.score import judge_model

        judged = judge_model(trained.model, trained.tokenizer, config, world, args.judge, config.seed)
        report |= {"scores": judged.summary, "details": judged.details}
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0


def _config(args: argparse.Namespace, checkpoint: Path, own: Config) -> Config:
    """The checkpoint's config, or the one given, with the overrides; the model stays the checkpoint's."""
    from fusiontrain.config.load import load

    overrides = list(args.overrides)
    path = args.config
    if path is not None and "=" in path:  # argparse takes the first override for the file
        overrides, path = [path, *overrides], None
    config = load(path or checkpoint / "config.yaml", overrides)
    for key in ("patch_size", "channels", "representation"):
        given, trained = getattr(config.data.image, key), getattr(own.data.image, key)
        if given != trained:
            raise UserError(f"data.image.{key}={given}: the checkpoint's model was trained with {trained}, which it cannot change: leave it as it was")
    return config.model_copy(update={"model": own.model})


def _demo_world(config: Config) -> Path | None:
    """The demo world whose split, as a folder or as tars in it, is the first validation source; None for other data."""
    from fusiontrain.data.world.make import world_info

    folders = Path(config.data.validation_sources[0].path).parents[:2]
    return next((folder for folder in folders if world_info(folder) is not None), None)


def _print(report: dict[str, Any]) -> None:
    rows = [("validation loss", name, f"{loss:.4f}") for name, loss in report["validation"].items()]
    rows += [("score", name, f"{value:.3f}") for name, value in report.get("scores", {}).items()]
    print_table(rows)
    for task, by_kind in report.get("details", {}).items():
        names = [name for name in by_kind["all"] if name != "count"]
        print(f"\n{task}: shares that are right")
        print_table([("", "count", *names), *((kind, int(part["count"]), *(f"{part[name]:.2f}" for name in names)) for kind, part in by_kind.items())], "  ")
