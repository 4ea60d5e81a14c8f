"""`fusiontrain sample`: pictures from text, text from pictures or from text, or all in turns, written to a folder."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fusiontrain.cli.common import add_json_argument, print_json
from fusiontrain.cli.sample_options import MAX_IMAGES, check_numbers, max_images_of, sampling_of, what_applies
from fusiontrain.config.schema import SampleConfig
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from fusiontrain.train.trained import Trained

SHEET = "contact-sheet.png"
RECORD = "samples.json"
SAMPLERS = get_args(SampleConfig.model_fields["sampler"].annotation)


class _InOrder(argparse.Action):
    """Collects --prompt and --image into one list, in the order they were typed: in interleaving that order is the document."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.pieces = [*namespace.pieces, (self.dest, values)]


def add_parser(subparsers: Any) -> None:
    """Add `sample` and its options."""
    parser = subparsers.add_parser("sample", help="paint, caption or interleave with a trained model", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, an exported folder, or a run folder (its newest checkpoint)")
    parser.add_argument("--prompt", action=_InOrder, metavar="TEXT", help="text; may be repeated; empty only where text is written from nothing")
    parser.add_argument("--image", action=_InOrder, metavar="FILE", help="a picture or, for a model of codes, its .vq.npy; may be repeated")
    parser.add_argument("--out", required=True, metavar="DIR", help=f"gets the pictures, {SHEET} and {RECORD}")
    parser.add_argument(
        "--mode",
        choices=("auto", *MODES),
        default="auto",
        help="auto: prompts alone are painted, or continued by a model of text; pictures alone are captioned; both are one document to go on with",
    )
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale, 1 = none (default: the config's)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the config's)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="of pictures (default: the config's)")
    parser.add_argument("--eta", type=float, help="of --sampler ddim: 0 draws no noise, 1 as much as ddpm (default: the config's)")
    parser.add_argument("--seed", type=int, help="of noise and of text drawn at a temperature (default: the config's)")
    parser.add_argument("--temperature", type=float, help="of text; 0 = the most likely token (default: the config's)")
    parser.add_argument("--max-new-tokens", type=int, help="tokens of new text (default: the config's)")
    parser.add_argument("--latents", type=int, metavar="CELLS", help="paint latents of CELLS x CELLS, of a model trained on latents: .latent.npy files")
    parser.add_argument("--max-images", type=int, help=f"new pictures of an interleaved document (default: {MAX_IMAGES})")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights (train.ema_decay)")
    add_json_argument(parser)
    parser.set_defaults(run=run, pieces=[])


def run(args: argparse.Namespace) -> int:
    """Sample and write. Returns the exit code; raises UserError for bad input."""
    mode = _mode(args)
    check_numbers(args)
    out = _checked_folder(args.out)
    from fusiontrain.generate.pictures import load_picture
    from fusiontrain.train.inference import load_for_inference

    pieces = [value if kind == "prompt" or _is_codes(value) else load_picture(value) for kind, value in args.pieces]
    trained = load_for_inference(args.checkpoint, args.ema)
    pieces = [piece if kind == "prompt" else _as_the_model_reads(value, piece, trained) for (kind, value), piece in zip(args.pieces, pieces, strict=True)]
    if mode == "paint" and args.mode == "auto" and not trained.has_images:
        mode = "write"
    if args.latents is not None and mode != "paint":
        raise UserError("sample: --latents is for painting: give --prompt alone, and a model that was trained on latents")
    settings = what_applies(args, mode, trained)
    samples, pictures, captions = MODES[mode](args, trained, pieces)
    record = {"checkpoint": str(trained.checkpoint), "mode": mode, **settings, "samples": samples}
    _write(out, record, pictures, captions)
    if args.json:
        print_json(record)
    else:
        print(_summary(record, out))
    return 0


def _mode(args: argparse.Namespace) -> str:
    kinds = {kind for kind, _ in args.pieces}
    if not kinds:
        raise UserError("sample: nothing to do: give --prompt TEXT or --image FILE")
    mode = args.mode
    if mode == "auto":
        mode = "interleave" if len(kinds) == 2 else "paint" if "prompt" in kinds else "caption"
    if mode in ("paint", "write", "speak") and kinds != {"prompt"}:
        raise UserError(f"sample: --mode {mode} takes --prompt only: leave --image out, or use --mode interleave")
    if mode == "caption" and kinds != {"image"}:
        raise UserError("sample: --mode caption takes --image only: leave --prompt out, or use --mode interleave")
    return mode


def _is_codes(path: str) -> bool:
    from fusiontrain.data.formats.pieces import CODES_SUFFIX

    return path.endswith(f".{CODES_SUFFIX}")


def _as_the_model_reads(path: str, picture: Any, trained: Trained) -> np.ndarray:
    """The picture, or the codes [n] int64 of a file of codes. Raises UserError for one that the model does not read."""
    from fusiontrain.generate.codes import load_codes

    if _is_codes(path) != trained.writes_codes:
        reads = "images as codes, which nothing here makes of a picture: give its .vq.npy" if trained.writes_codes else "no codes: give a picture"
        raise UserError(f"sample: --image {path}: this model reads {reads}")
    return load_codes(path, trained.config.data.image) if trained.writes_codes else picture


Result = tuple[list[dict[str, Any]], list["np.ndarray"], list[str]]
"""Records of the samples, the new pictures or latents that their "file" entries name, and what the contact sheet says under each."""


def _paint(args: argparse.Namespace, trained: Trained, prompts: Sequence[str]) -> Result:
    if trained.writes_codes and args.latents is None:
        images = trained.paint_codes(prompts, sampling_of(args, trained))
        return [{"prompt": prompt, "codes": codes} for prompt, codes in zip(prompts, images, strict=True)], [], []
    if args.latents is not None:
        pictures = trained.paint_latents(prompts, sampling_of(args, trained), args.latents)
    else:
        pictures = trained.paint(prompts, sampling_of(args, trained))
    files = [_file(number, picture) for number, picture in enumerate(pictures)]
    return [{"prompt": prompt, "file": file} for prompt, file in zip(prompts, files, strict=True)], pictures, list(prompts)


def _continue(args: argparse.Namespace, trained: Trained, prompts: Sequence[str]) -> Result:
    texts = trained.write(prompts, sampling_of(args, trained))
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)], [], []


def _speak(args: argparse.Namespace, trained: Trained, prompts: Sequence[str]) -> Result:
    units = trained.speak(prompts, sampling_of(args, trained))
    return [{"prompt": prompt, "units": spoken} for prompt, spoken in zip(prompts, units, strict=True)], [], []


def _caption(args: argparse.Namespace, trained: Trained, pictures: Sequence[np.ndarray]) -> Result:
    tell = trained.caption_codes if trained.writes_codes else trained.captions
    texts = tell(pictures, sampling_of(args, trained))
    sources = [value for _, value in args.pieces]
    records = [{"image": source, "text": text} for source, text in zip(sources, texts, strict=True)]
    return (records, [], []) if trained.writes_codes else (records, list(pictures), texts)


def _interleave(args: argparse.Namespace, trained: Trained, prompt: Sequence[Any]) -> Result:
    if trained.writes_codes:
        written = trained.write_document(prompt, sampling_of(args, trained), max_images_of(args))
        found = [{"text": piece} if isinstance(piece, str) else {"codes": piece} for piece in written]
        return [{"prompt": [{kind: value} for kind, value in args.pieces], "pieces": found}], [], []
    produced = trained.interleave(prompt, sampling_of(args, trained), max_images_of(args))
    pieces: list[dict[str, str]] = []
    pictures: list[np.ndarray] = []
    captions: list[str] = []
    before = " ".join(value for kind, value in args.pieces if kind == "prompt")
    for piece in produced:
        if isinstance(piece, str):
            pieces.append({"text": piece})
            before = f"{before} {piece}".strip()
        else:
            pieces.append({"file": _file(len(pictures), piece)})
            pictures.append(piece)
            captions.append(before)
            before = ""
    return [{"prompt": [{kind: value} for kind, value in args.pieces], "pieces": pieces}], pictures, captions


MODES: dict[str, Callable[..., Result]] = {"paint": _paint, "write": _continue, "speak": _speak, "caption": _caption, "interleave": _interleave}


def _checked_folder(path: str) -> Path:
    """The output folder, which can be made: an hour of painting must not end at one that cannot be. It is made when there is something to write."""
    out = Path(path)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out}: cannot be written ({existing} is no folder)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot be written ({existing} is not yours to write to)")
    return out


def _not_writable(out: Path, error: OSError) -> UserError:
    return UserError(f"--out {out}: cannot be written ({error.strerror or error})")


def _file(number: int, picture: np.ndarray) -> str:
    """The name of a picture [H, W, 3] uint8 or of a latent [C, H, W] float32."""
    from fusiontrain.data.formats.pieces import LATENT_SUFFIX

    return f"{number:03d}.png" if picture.dtype == "uint8" else f"{number:03d}.{LATENT_SUFFIX}"


def _write(out: Path, record: dict[str, Any], pictures: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    import numpy as np
    from PIL import Image

    from fusiontrain.generate.pictures import contact_sheet

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for number, picture in enumerate(pictures if record["mode"] != "caption" else ()):
            path = out / _file(number, picture)
            np.save(path, picture) if path.suffix == ".npy" else Image.fromarray(picture).save(path)
        if len(pictures) and pictures[0].dtype == "uint8":
            contact_sheet(pictures, captions).save(out / SHEET)
    except OSError as error:
        raise _not_writable(out, error) from error


def _summary(record: dict[str, Any], out: Path) -> str:
    lines = []
    for sample in record["samples"]:
        if record["mode"] == "paint":
            lines.append(f"{out / sample['file'] if 'file' in sample else _codes(sample)}: {sample['prompt']}")
        elif record["mode"] == "write":
            lines.append(sample["prompt"] + sample["text"])
        elif record["mode"] == "speak":
            lines.append(f"{len(sample['units'])} units in {RECORD}: {sample['prompt']}")
        elif record["mode"] == "caption":
            lines.append(f"{sample['image']}: {sample['text']}")
        else:
            lines += [str(out / piece["file"]) if "file" in piece else piece.get("text") or _codes(piece) for piece in sample["pieces"]]
    return "\n".join([*lines, f"written to {out}: {RECORD}" + (f", {SHEET}" if (out / SHEET).exists() else "")])


def _codes(image: dict[str, Any]) -> str:
    return f"{len(image['codes'])} codes in {RECORD}"
