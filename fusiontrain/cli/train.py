"""`fusiontrain train`: a run from its configuration to its last checkpoint, alone or as one of torchrun's processes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusiontrain.cli.common import add_config_arguments, add_json_argument, print_json
from fusiontrain.cli.reporters import make_reporter


def add_parser(subparsers: Any) -> None:
    """Adds `train` to the program's subparsers."""
    parser = subparsers.add_parser("train", help="train a model; under torchrun, one process per device")
    add_config_arguments(parser)
    parser.add_argument(
        "--resume", metavar="auto|none|PATH", help="newest complete checkpoint of run.dir, a new start, or a checkpoint folder"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when the run is done or stopped on request after a save, 1 when it diverged; UserError for bad input."""
    from fusiontrain.cli.first_use import prepare
    from fusiontrain.config.load import load
    from fusiontrain.parallel.mesh import process_group, read_ranks
    from fusiontrain.train.build import check_config
    from fusiontrain.train.metrics import close_log, open_log
    from fusiontrain.train.run_lock import only_training_in
    from fusiontrain.utils.errors import UserError

    ranks = read_ranks()
    try:
        config = load(args.config, [*args.overrides, *([f"checkpoint.resume={args.resume}"] if args.resume else [])])
        prepare(config, ranks)
        check_config(config, ranks.world_size)
    except UserError:
        if not ranks.is_main:
            return 2  # all ranks read the same file: the main one says what is wrong with it
        raise
    log = open_log(Path(config.run.dir), ranks.rank)
    try:
        with process_group(ranks, config.parallel), only_training_in(Path(config.run.dir)):
            return _train(config, ranks, args.json)
    finally:
        close_log(log)


def _train(config: Any, ranks: Any, as_json: bool) -> int:
    from fusiontrain.train.build import build_trainer
    from fusiontrain.train.signals import stop_on_signals
    from fusiontrain.train.trainer import TrainingDiverged

    reporter = make_reporter(ranks.is_main)
    with stop_on_signals() as stop:
        try:
            trainer = build_trainer(config, ranks, reporter, stop)
        except BaseException:
            reporter.finished()
            raise
        try:
            finished = trainer.run()
        except TrainingDiverged as error:
            reporter.event(f"error: {error}")
            return 1
        finally:
            reporter.finished()
            trainer.close()
    if ranks.is_main and as_json:
        folder = Path(config.run.dir)
        checkpoint = folder / "checkpoints" / f"step-{trainer.state.step:08d}"
        print_json({"run": str(folder), "step": trainer.state.step, "finished": finished, "checkpoint": str(checkpoint)})
    return 0
