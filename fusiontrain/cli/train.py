"""`fusiontrain train`: a run from its configuration to its last checkpoint, alone or as one of torchrun's processes."""

from __future__ import annotations

import argparse
import errno
import logging
import os
from pathlib import Path
from typing import Any

from fusiontrain.cli.common import add_config_arguments, add_json_argument, note, print_json
from fusiontrain.cli.reporters import SilentReporter, make_reporter
from fusiontrain.utils.orphans import die_with_parent

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""Reading never fails like this, so it is the run folder."""

logger = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    """Adds `train` to the program's subparsers."""
    parser = subparsers.add_parser("train", help="train a model; under torchrun, one process per device")
    add_config_arguments(parser)
    parser.add_argument(
        "--resume", metavar="auto|none|PATH", help="newest complete checkpoint of run.dir, a new start, or the folder of a checkpoint or of a run"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when the run is done or stopped on request after a save, 1 when it diverged, 2 for bad input, which is told here under a launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    logging.raiseExceptions = False  # a log on a full disk must not fill the terminal: the run will end with a sentence
    from fusiontrain.cli.rank_errors import Told, end_before_start, others_failed
    from fusiontrain.parallel.mesh import process_group, read_ranks
    from fusiontrain.train.metrics import close_log, open_log
    from fusiontrain.train.signals import stop_on_signals
    from fusiontrain.utils.errors import UserError

    ranks = read_ranks()
    try:
        config = _prepare(args, ranks)
        log = open_log(Path(config.run.dir), ranks.rank)
    except UserError as error:
        if ranks.world_size == 1:
            raise
        end_before_start(error, ranks)
        return 2
    try:
        with stop_on_signals() as stop, process_group(ranks, config.parallel):
            return 2 if others_failed() else _hold_and_train(config, ranks, stop, args.json)
    except Told as told:
        logger.error("the run ended: %s", told.__cause__)
        return 2
    except Exception:
        logger.exception("the run ended with an error")
        raise
    finally:
        close_log(log)


def _prepare(args: argparse.Namespace, ranks: Any) -> Any:
    """The config, once everything that it names is there."""
    from fusiontrain.cli.first_use import prepare
    from fusiontrain.config.load import load
    from fusiontrain.train.build import check_config
    from fusiontrain.train.checkpoint.base import with_base

    config = load(args.config, [*args.overrides, *([f"checkpoint.resume={args.resume}"] if args.resume is not None else [])])
    prepare(config, ranks)
    config = with_base(config)
    check_config(config, ranks.world_size)
    return config


def _hold_and_train(config: Any, ranks: Any, stop: Any, as_json: bool) -> int:
    """Train while the run folder is held. Raises Told for what the user can mend."""
    from fusiontrain.cli.rank_errors import Told, tell, tell_in_run
    from fusiontrain.train.run_lock import only_training_in
    from fusiontrain.utils.errors import UserError

    folder, held = Path(config.run.dir), False
    try:
        with only_training_in(folder):
            held = True
            return _train(config, ranks, stop, as_json)
    except UserError as error:
        if held:
            tell_in_run(error, ranks, folder / "logs")
        elif ranks.is_main:  # all ranks have the same
            tell(error)
        raise Told from error


def _train(config: Any, ranks: Any, stop: Any, as_json: bool) -> int:
    from fusiontrain.train.progress import Progress
    from fusiontrain.train.trainer import TrainingDiverged
    from fusiontrain.train.watchdog import Watchdog
    from fusiontrain.utils.errors import UserError

    reporter, progress, folder = make_reporter(ranks.is_main), Progress(), Path(config.run.dir)

    def say(sentence: str) -> None:
        reporter.finished()
        note(f"fusiontrain: error: {sentence}")

    with Watchdog(folder, ranks, progress, stop, config.parallel.timeout_seconds, config.checkpoint.grace_seconds, say) as watchdog:
        try:
            document = _run(config, ranks, stop, reporter, progress, watchdog)
        except TrainingDiverged as error:
            reporter.event(f"error: {error}")
            return 1
        except OSError as error:
            if error.errno in CANNOT_WRITE:
                why = f"{folder}: cannot be written ({error.strerror})"
                raise UserError(f"{why}: the checkpoints there stand; make room and run the same command again") from error
            raise
        finally:
            reporter.finished()
    if ranks.is_main and as_json:
        print_json({"run": str(folder), **document})
    return 0


def _run(config: Any, ranks: Any, stop: Any, reporter: SilentReporter, progress: Any, watchdog: Any) -> dict[str, Any]:
    """Train; returns where that ended. Where other ranks are lost, the watchdog ends the process before anything is closed, which could hang."""
    from fusiontrain.train.build import build_trainer
    from fusiontrain.train.signals import BreakOff

    try:
        trainer = build_trainer(config, ranks, reporter, stop, progress)
    except BreakOff:
        reporter.event("stopped before the first step: there is nothing to save")
        return {"step": None, "finished": False, "checkpoint": None}
    except Exception as error:
        watchdog.end_if_lost(error)
        raise
    try:
        finished = trainer.run()
    except Exception as error:
        watchdog.end_if_lost(error)
        raise
    finally:
        trainer.close()
    if not finished:
        reporter.event(f"stopped on request at step {trainer.state.step} of {config.train.steps}, and saved: the same command goes on from there")
    checkpoint = Path(config.run.dir) / "checkpoints" / f"step-{trainer.state.step:08d}"
    return {"step": trainer.state.step, "finished": finished, "checkpoint": str(checkpoint)}
