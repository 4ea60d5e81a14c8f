"""What the commands share: arguments that look the same everywhere, and how they print.

A command is a module of this package with `add_parser(subparsers)` and `run(args) -> int` (the exit code), and a place in
`main.COMMANDS`. It imports what is slow (torch, transformers) inside `run`, so that `fusiontrain --help` stays quick.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from typing import Any


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`CONFIG.yaml [a.b=c ...]`: gives `args.config` and `args.overrides`. Overrides may also stand behind options."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="a complete configuration; see configs/")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values to use instead, such as train.steps=50")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json`: gives `args.json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """`--format` and `--text-key`: how samples are read, see `sample_kind`."""
    parser.add_argument("--format", choices=["auto", "interleaved", "captions"], default="auto", help="as data.sources.N.format (default: auto)")
    parser.add_argument("--text-key", metavar="FIELD", help="field of the json that holds the text, as data.sources.N.text_key")


def sample_kind(args: argparse.Namespace) -> str:
    """The kind of samples that `--format` and `--text-key` ask for, as `read_sample` takes it."""
    from fusiontrain.config.schema import SourceConfig
    from fusiontrain.data.formats.read import source_kind

    return source_kind(SourceConfig(path="", format=args.format, text_key=args.text_key))


def print_json(document: Any) -> None:
    """The one JSON document that a command with `--json` prints on stdout. NaN and infinity are refused: they are not JSON."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(rows: Iterable[Iterable[Any]], indent: str = "") -> None:
    """Rows of cells on stdout, columns as wide as their widest cell; numbers stand to the right."""
    table = [list(row) for row in rows]
    texts = [[_cell(cell) for cell in row] for row in table]
    widths = [max(len(row[column]) for row in texts if column < len(row)) for column in range(max(map(len, texts), default=0))]
    for row, cells in zip(table, texts, strict=True):
        aligned = (
            text.rjust(width) if isinstance(cell, int | float) else text.ljust(width)
            for cell, text, width in zip(row, cells, widths, strict=False)
        )
        print((indent + "  ".join(aligned)).rstrip())


def note(message: str) -> None:
    """A line for the person at the terminal, on stderr, so that stdout stays a document."""
    print(message, file=sys.stderr, flush=True)


class ProgressLines:
    """A line on stderr now and then while a training runs in a process of its own: a `fusiontrain.studies.child.Progress`."""

    def __init__(self, seconds: float = 15) -> None:
        self.seconds, self.last = seconds, 0.0

    def __call__(self, run: str, step: int, steps: int) -> None:
        if step and time.monotonic() - self.last > self.seconds:
            note(f"      {run}: step {step:,}" + (f" of {steps:,}" if steps else ""))
            self.last = time.monotonic()


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
