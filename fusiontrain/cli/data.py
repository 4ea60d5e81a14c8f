"""`fusiontrain data`: the demo world, the index of shards, and what a plan will show a model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusiontrain.cli import data_inspect
from fusiontrain.cli.common import add_config_arguments, add_format_arguments, add_json_argument, note, print_json, print_table, sample_kind
from fusiontrain.utils.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Adds `data` to the program's subparsers."""
    actions = subparsers.add_parser("data", help="make, index, check and look at data").add_subparsers(dest="action", metavar="ACTION", required=True)
    world = actions.add_parser("make-world", help="write the demo world: scenes, pictures and captions as tar shards")
    world.add_argument("directory", metavar="DIR")
    world.add_argument("--documents", type=int, default=2000)
    world.add_argument("--seed", type=int, default=0)
    index = actions.add_parser("index", help="index shards (kept beside them) and count what is in them")
    verify = actions.add_parser("verify", help="read index and shards, compare every CRC32, decode every image; exit 2 on damage")
    for parser in (index, verify):
        parser.add_argument("shards", metavar="SHARDS", nargs="+", help="a tar or .jsonl, a folder of them, a glob, a brace range, a URL, or pipe:COMMAND")
        add_format_arguments(parser)
        parser.add_argument(
            "--representation", choices=["pixels", "latents", "codes"], default="pixels", help="as data.image.representation (default: pixels)"
        )
        parser.add_argument("--tokenizer", help="folder or tokenizer.json, or 'bytes': tokenise the texts too, as a training with it would")
        parser.add_argument("--workers", type=int, default=1, help="processes that index, a shard at a time (default: 1)")
        parser.add_argument("--out", metavar="DIR", help="keep the index there, for shards in a read-only place; a training needs data.index_dir=DIR then")
    index.add_argument("--exclude", metavar="FILE", help="leave the samples of this file of JSON lines (shard, key), such as a run's "
                       "bad_samples.jsonl, out of every plan from now on; a relative shard is meant from the current folder")
    data_inspect.add_parser(actions)
    plan = actions.add_parser("plan", help="what the first steps of a training will hold: no sample is read")
    add_config_arguments(plan)
    plan.add_argument("--steps", type=int, default=20)
    plan.add_argument("--world-size", type=int, default=1, help="ranks to balance for (default: 1)")
    peek = actions.add_parser("peek", help="write what a training step saw as text files and pictures")
    add_config_arguments(peek)
    peek.add_argument("--step", type=int, required=True, help="as in metrics.jsonl, from 1")
    peek.add_argument("--rank", type=int, default=0, help="only the share of this rank out of --world-size")
    peek.add_argument("--world-size", type=int, default=1)
    peek.add_argument("--out", metavar="DIR", help="default: peek-step-N")
    convert = actions.add_parser("convert", help="write a published interleaved dataset as shards, with pictures that are downloaded already")
    convert.add_argument("source", metavar="SOURCE", help=".parquet, .jsonl, .jsonl.gz, .jsonl.zip or .tar of .json: one, a folder, a glob, or a brace range")
    convert.add_argument("out", metavar="OUT", help="folder of the shards; run again to go on with a conversion that was broken off")
    convert.add_argument("--format", required=True, choices=["obelics", "mmc4", "moscar", "jsonl"], help="obelics also reads MINT-1T-HTML")
    convert.add_argument("--pictures", metavar="PATH", nargs="+", default=[], help="tars or folders of pictures, found by URL (img2dataset) or by file name")
    convert.add_argument("--image-position", choices=["before", "after", "random"], default="before", help="mmc4: of a picture and its sentence")
    convert.add_argument("--text-key", metavar="FIELD", default="text", help="jsonl: the field with the text (default: text)")
    convert.add_argument("--documents-per-shard", type=int, default=1000)
    convert.add_argument("--workers", type=int, default=1, help="processes, a file each (default: 1)")
    for parser in (world, index, verify, plan, peek, convert):
        add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or UserError with one sentence."""
    if args.action == "inspect":
        return data_inspect.run(args)
    actions = {"make-world": _make_world, "index": _index, "verify": _verify, "plan": _plan, "peek": _peek, "convert": _convert}
    report = actions[args.action](args)
    if args.json:
        print_json(report)
    else:
        print_table((key, value if isinstance(value, int) else str(value)) for key, value in report.items())
    return 0


def _make_world(args: argparse.Namespace) -> dict[str, Any]:
    from fusiontrain.data.world.make import make_world

    with _writing(args.directory):
        info = make_world(args.directory, args.documents, args.seed)
    return {"world": args.directory, "seed": args.seed, **{f"{split} documents": count for split, count in info["documents"].items()}}


@contextmanager
def _writing(folder: str) -> Iterator[None]:
    """A disk that is full or may not be written is one sentence, not a traceback."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: could not be written to its end ({error}); make room there, or name another folder") from error


def _indexed(args: argparse.Namespace) -> Any:
    """The shards with their indexes and, with --tokenizer, their tokens; what is missing is built, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fusiontrain.config.schema import TokenizerConfig
    from fusiontrain.data.index.cache import Reading, measure_shards
    from fusiontrain.data.shards import expand_shards
    from fusiontrain.data.tokenizer import tokenizer_at

    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    shards = list(dict.fromkeys(shard for path in args.shards for shard in expand_shards(path)))
    how = Reading(sample_kind(args), args.representation, None if args.out is None else Path(args.out))
    source = None if args.tokenizer is None else (args.tokenizer, TokenizerConfig())
    console = Console(stderr=True)
    columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("shards", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return measure_shards(shards, how, tokenizer_at(*source) if source else None, args.workers, source, show)


def _index(args: argparse.Namespace) -> dict[str, Any]:
    from fusiontrain.data.index.exclude import exclude, read_exclusions

    found = _indexed(args)
    excluded = exclude(found.shards, found.indexes, read_exclusions(Path(args.exclude)) if args.exclude else {}, None if args.out is None else Path(args.out))
    rows = found.indexes.rows
    empty = [row.name for row in rows if not row.documents and not row.unusable]
    if len(empty) == len(rows):
        raise UserError(f"{', '.join(args.shards)}: not one sample in {len(rows)} shards; what is in them?")
    if empty:
        note(f"{len(empty)} of {len(rows)} shards hold no sample, the first of them is {empty[0]}")
    return {
        "shards": len(rows),
        "samples": sum(row.documents for row in rows),
        "unusable samples": sum(row.unusable for row in rows),
        "excluded samples": excluded,
        "images": sum(row.images for row in rows),
        "text bytes": sum(row.text_bytes for row in rows),
        **({"text tokens": sum(row.tokens for row in found.tokens.rows)} if found.tokens is not None else {}),
    }


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    """Structure and headers are checked by indexing; then the index's own files, every member against its CRC32, and every image by decoding it."""
    from fusiontrain.data.index.verify import verify_index, verify_shard

    samples = 0
    found = _indexed(args)
    problems = verify_index(found.indexes.folders)
    for shard, index in zip(found.shards, () if problems else found.indexes, strict=not problems):
        problems += verify_shard(shard, index)
        samples += len(index)
    if problems:
        raise UserError("\n".join(problems))
    return {"samples": samples, "problems": 0}


def _planned(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(config, tokenizer, plan) of the training that the arguments name."""
    from fusiontrain.config.load import load
    from fusiontrain.data.index.cache import index_sources
    from fusiontrain.data.plan.plan import Plan
    from fusiontrain.data.tokenizer import load_tokenizer

    config = load(args.config, args.overrides)
    if config.data.mode == "stream":
        raise UserError("data.mode=stream has no plan: what a step holds is known when it is read; index the shards and set data.mode=planned")
    tokenizer = load_tokenizer(config)
    return config, tokenizer, Plan(config, index_sources(config.data.sources, config.data, tokenizer), tokenizer, training=True)


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from fusiontrain.data.plan.report import report

    if args.steps < 1 or args.world_size < 1:
        raise UserError(f"--steps {args.steps} --world-size {args.world_size}: both must be at least 1")
    config, _, plan = _planned(args)
    note(f"planning {args.steps} steps")
    return report(plan, config, args.steps, args.world_size)


def _peek(args: argparse.Namespace) -> dict[str, Any]:
    """Steps count from 1, as in metrics.jsonl: step N is what the N-th update was computed from."""
    from fusiontrain.data.peek import peek
    from fusiontrain.data.plan.plan import check_world_size

    config, tokenizer, plan = _planned(args)
    if args.step < 1 or not 0 <= args.rank < args.world_size:
        raise UserError(f"--step {args.step} --rank {args.rank}: steps count from 1, ranks from 0 to --world-size {args.world_size} minus 1")
    check_world_size(config, args.world_size)
    sequences = plan.share(plan.data_step(args.step - 1), args.rank, args.world_size)
    return {"step": args.step, **peek(sequences, plan, config, tokenizer, Path(args.out or f"peek-step-{args.step}"))}


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from collections import Counter

    from rich.console import Console
    from rich.progress import Progress

    from fusiontrain.data.convert.convert import convert

    if args.documents_per_shard < 1:
        raise UserError(f"--documents-per-shard {args.documents_per_shard}: must be at least 1")
    settings = (args.format, args.pictures, args.image_position, args.text_key, args.documents_per_shard, args.workers)
    console, total = Console(stderr=True), Counter[str]()
    with _writing(args.out), Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("files")
        for done, (_, counts, files) in enumerate(convert(args.source, Path(args.out), *settings), 1):
            total.update(counts)
            progress.update(bar, completed=done, total=files)
    if not total["documents"]:
        said = ", ".join(f"{count} {what}" for what, count in total.items() if count) or "no record at all"
        raise UserError(f"{args.source}: not one document as --format {args.format} ({said}); {args.out}/.convert/*.dropped.jsonl says why of each")
    return {"shards in": args.out, "files": files, **total}
