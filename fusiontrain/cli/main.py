"""The entry point: finds the command, and turns every mistake of the user into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from fusiontrain import __version__
from fusiontrain.utils.errors import UserError

PROGRAM = "fusiontrain"

COMMANDS: tuple[str, ...] = (
    "demo", "train", "sample", "evaluate", "data", "config", "checkpoint", "estimate", "profile", "reproduce", "launch", "doctor",
)  # fmt: skip
"""Modules of this package, in the order of `--help`. To add a command, write its module and its name here."""

EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one sentence, as all errors of the program are."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 2 bad arguments or input, 130 interrupted, else 1.

    An error that is no `UserError` is ours: it keeps its traceback, and Python ends with 1.
    """
    modules = {name: importlib.import_module(f"fusiontrain.cli.{name}") for name in COMMANDS}
    args = _parse(_parser(modules), list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        code = modules[args.command].run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{PROGRAM}: error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _parser(modules: dict[str, ModuleType]) -> Parser:
    parser = Parser(prog=PROGRAM, description="Pretraining for models that read and write text and images in one sequence.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in modules.values():
        module.add_parser(subparsers)
    return parser


def _parse(parser: Parser, argv: list[str]) -> argparse.Namespace:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        parser.error(f"there is no command {argv[0]!r}; {hint}")
    args, rest = parser.parse_known_args(argv)
    # argparse gives `a.b=c` to `overrides` only before the first option; take the ones behind options too.
    late = [item for item in rest if "=" in item and not item.startswith("-")]
    unknown = [item for item in rest if item not in late or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"not understood: {' '.join(unknown)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args
