"""`fusiontrain checkpoint export|import`: models out, as folders that need nothing else, and folders of weights in, for runs to start from."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontrain.cli.common import add_json_argument, note, print_json, print_table
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.train.export import Exported, Format
    from fusiontrain.train.sources import Source

ACTIONS = ("export", "import")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_parsers(actions: Any) -> None:
    """Adds both to the actions of `checkpoint`."""
    export = actions.add_parser("export", help="write a model as a folder for transformers or for fusiontrain.load")
    export.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder (its newest checkpoint), a checkpoint, or an exported folder")
    export.add_argument(
        "--format",
        choices=("huggingface", "fusiontrain"),
        help="huggingface: a Llama; of a model with images its text side. fusiontrain: all of it (default: huggingface for dense models)",
    )
    export.add_argument("--ema", action="store_true", help="the moving average of the weights (train.ema_decay)")
    bring = actions.add_parser("import", help="check a Llama or an exported folder and make it one that model.base takes")
    bring.add_argument("source", metavar="DIR", help="a Hugging Face Llama folder (safetensors), or an exported folder")
    for parser in (export, bring):
        parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; it is whole or not there")
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as stored)")
        parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights, such as 500MB or 5GB (default: 5GB)")
        parser.add_argument("--overwrite", action="store_true", help="replace an exported model that is there")
        add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for what cannot be read or written."""
    shard_bytes = parse_size(args.max_shard_size)
    from fusiontrain.train.export import natural_format
    from fusiontrain.train.sources import open_source

    if args.action == "import":
        source, kind = _open_foreign(Path(args.source))
    else:
        source = open_source(args.source, args.ema)
        kind = args.format or natural_format(source)
    exported = _write(args, source, kind, shard_bytes)
    if args.action == "import":
        _say_what_is_missing(exported.folder, kind)
    if args.json:
        print_json(_document(args, exported))
    else:
        _print(args, exported)
    return 0


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)", text.strip().upper())
    size = round(float(match.group(1)) * UNITS[match.group(2)]) if match and match.group(2) in UNITS else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: give a size such as 500MB or 5GB")
    return size


def _open_foreign(folder: Path) -> tuple[Source, Format]:
    """A folder of weights of others, every value of which is looked at as it passes."""
    from dataclasses import replace

    from fusiontrain.models.base import is_exported
    from fusiontrain.train.sources import open_folder

    source = open_folder(folder)

    def read(name: str) -> Any:
        values = source.read(name)
        if not values.isfinite().all():
            raise UserError(f"{folder}: {name} holds values that are not finite: it is damaged, fetch it again")
        return values

    return replace(source, read=read), "fusiontrain" if is_exported(folder) else "huggingface"


def _write(args: argparse.Namespace, source: Source, kind: Format, shard_bytes: int) -> Exported:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from fusiontrain.train.export import export_model

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    console = Console(stderr=True)
    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("weights", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return export_model(source, Path(args.out), kind, dtype, shard_bytes, args.overwrite, show)


def _say_what_is_missing(folder: Path, kind: Format) -> None:
    """A Llama has no tokens for images of its own; which of its reserved ones are to be those, only a config can say."""
    from fusiontrain.config.schema import TokenizerConfig
    from fusiontrain.data.tokenizer import tokenizer_at

    if kind == "huggingface":
        try:
            tokenizer_at(str(folder), TokenizerConfig())
        except UserError as error:
            note(f"note for the config: {error}")


def _document(args: argparse.Namespace, exported: Exported) -> dict[str, Any]:
    return {
        "source": args.source,
        "folder": str(exported.folder),
        "format": exported.format,
        "recipe": exported.recipe,
        "step": exported.step,
        "tensors": exported.tensors,
        "parameters": exported.parameters,
        "files": dict(exported.files),
    }


def _print(args: argparse.Namespace, exported: Exported) -> None:
    rows = [(name, f"{entry['size'] / 2**20:,.1f} MiB") for name, entry in exported.files.items()]
    print_table([*rows, (f"{exported.parameters:,} parameters in {exported.tensors} tensors",)])
    if args.action == "import":
        print(f"a run starts from it with model.base={exported.folder}")
    elif exported.format == "huggingface":
        print(f'transformers.AutoModelForCausalLM.from_pretrained("{exported.folder}")')
    else:
        print(f'fusiontrain.load("{exported.folder}")')
