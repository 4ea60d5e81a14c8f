"""`fusiontrain data inspect`: one sample in the terminal, or as a PNG."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontrain.cli.common import add_format_arguments, add_json_argument, note, print_json, sample_kind
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from fusiontrain.data.inspect import Inspection

LETTERS = 2000
"""What is shown of a text; `--json` has all of it."""

WIDEST, HIGHEST = 96, 48
"""Of a picture in a terminal, in characters, two pixels above each other in each."""

UPPER_HALF = "\N{UPPER HALF BLOCK}"


def add_parser(actions: Any) -> None:
    """Adds `inspect` to the actions of `data`."""
    parser = actions.add_parser("inspect", help="show one sample: members, texts, pictures")
    parser.add_argument("shards", metavar="SHARD", nargs="+", help="a tar or .jsonl, a folder of them, a glob, or a brace range; no index is needed")
    add_format_arguments(parser)
    parser.add_argument("--sample", default="0", metavar="N|KEY", help="number of the sample, from 0 over all shards, or its key (default: 0)")
    parser.add_argument("--png", metavar="FILE", help="write the sample there as one picture, instead of drawing it in the terminal")
    parser.add_argument("--tokenizer", help="folder or tokenizer.json, or 'bytes': count the tokens of the texts")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or UserError with one sentence."""
    from fusiontrain.config.schema import TokenizerConfig
    from fusiontrain.data.inspect import find_sample, inspect_sample, sheet
    from fusiontrain.data.shards import expand_shards
    from fusiontrain.data.tokenizer import tokenizer_at

    tokenizer = None if args.tokenizer is None else tokenizer_at(args.tokenizer, TokenizerConfig())
    shards = [shard for path in args.shards for shard in expand_shards(path)]
    inspection = inspect_sample(*find_sample(shards, args.sample), sample_kind(args), tokenizer)
    if args.png is not None:
        try:
            Path(args.png).parent.mkdir(parents=True, exist_ok=True)
            sheet(inspection).save(args.png, "PNG")
        except OSError as error:
            raise UserError(f"--png {args.png}: cannot be written ({error.strerror or error})") from error
        note(f"wrote {args.png}")
    if args.json:
        print_json(_document(inspection))
    else:
        _show(inspection, draw=args.png is None)
    return 0


def _document(inspection: Inspection) -> dict[str, Any]:
    pieces: list[dict[str, Any]] = []
    for piece in inspection.pieces:
        if piece.text is not None:
            pieces.append({"text": piece.text} | ({} if piece.num_tokens is None else {"tokens": piece.num_tokens}))
        else:
            pieces.append({"image": piece.image, "about": piece.about})
    members = [{"suffix": suffix, "offset": member.offset, "bytes": member.size} for suffix, member in inspection.members.items()]
    return {"shard": str(inspection.shard), "sample": inspection.number, "key": inspection.key, "members": members, "pieces": pieces}


def _show(inspection: Inspection, draw: bool) -> None:
    """draw: pictures too, if stdout is a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fusiontrain.data.inspect import printable

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{inspection.shard}: sample {inspection.number} ({printable(inspection.key)})", style="bold"))
    table = Table("member", "offset", "bytes", "", box=None, pad_edge=False, header_style="dim")
    about = {piece.image: piece.about for piece in inspection.pieces if piece.image is not None}
    for suffix, member in inspection.members.items():
        table.add_row(*(Text(cell) for cell in (f".{printable(suffix)}", f"{member.offset:,}", f"{member.size:,}", about.get(suffix, ""))))
    console.print(table, soft_wrap=False)
    for number, piece in enumerate(inspection.pieces):
        console.print()
        if piece.text is None:
            console.print(Text(f"{number}  image .{piece.image}, {piece.about}", style="dim"))
            if piece.picture is not None and draw and console.is_terminal:
                console.print(half_blocks(piece.picture, min(WIDEST, console.width), HIGHEST))
            continue
        tokens = "" if piece.num_tokens is None else f", {piece.num_tokens:,} tokens"
        console.print(Text(f"{number}  text, {len(piece.text):,} characters{tokens}", style="dim"))
        rest = len(piece.text) - LETTERS
        console.print(Text(printable(piece.text[:LETTERS]) + (f" ... and {rest:,} characters more" if rest > 0 else "")))


def half_blocks(picture: Any, columns: int, rows: int) -> Text:
    """A picture [H, W, 3] uint8 in at most that many characters, each of them two pixels: the upper in its colour, the lower in its background's."""
    import numpy as np
    from PIL import Image
    from rich.style import Style
    from rich.text import Text

    image = Image.fromarray(picture)
    image.thumbnail((columns, 2 * rows), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    text = Text(no_wrap=True)
    for place in range(0, len(pixels), 2):
        for upper, lower in zip(pixels[place].tolist(), pixels[place + 1].tolist(), strict=True):
            text.append(UPPER_HALF, Style.parse(f"rgb({','.join(map(str, upper))}) on rgb({','.join(map(str, lower))})"))
        text.append("\n")
    text.rstrip()
    return text
