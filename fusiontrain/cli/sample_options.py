"""The options of `fusiontrain sample`: their limits, and which of them apply to what a model is asked for."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.train.trained import Sampling, Trained

LEAST = {"steps": 1, "guidance": 0, "seed": 0, "temperature": 0, "max_new_tokens": 1, "max_images": 0, "latents": 1}
MAX_IMAGES = 4
MAKES_PICTURES = ("paint", "interleave")


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UserError for a number that no model could do with."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"sample: {_option(name)} {value}: must be a number of at least {least}")
    if args.eta is not None and not 0 <= args.eta <= 1:
        raise UserError(f"sample: --eta {args.eta}: must be a number from 0 to 1")


def sampling_of(args: argparse.Namespace, trained: Trained) -> Sampling:
    """What the options leave open comes from the config that the model was trained with."""
    names = ("seed", "steps", "guidance", "sampler", "eta", "temperature", "max_new_tokens")
    return trained.sampling(**{name: getattr(args, name) for name in names})


def max_images_of(args: argparse.Namespace) -> int:
    return MAX_IMAGES if args.max_images is None else args.max_images


def what_applies(args: argparse.Namespace, mode: str, trained: Trained) -> dict[str, Any]:
    """The settings that this sampling goes by, by name. Raises UserError for an option that was given and does not apply, or an empty prompt."""
    sampling = sampling_of(args, trained)
    reasons = _why_not(mode, trained, sampling)
    for name, reason in reasons.items():
        if getattr(args, name) is not None:
            raise UserError(f"sample: {_option(name)} {getattr(args, name)} does not apply: {reason}")
    if mode != "write" and any(kind == "prompt" and not value.strip() for kind, value in args.pieces):
        raise UserError(f"sample: --prompt is empty, which --mode {mode} takes for nothing: write a prompt, or leave it out")
    settings = {**asdict(sampling), "max_images": max_images_of(args)}
    return {name: value for name, value in settings.items() if name not in reasons}


def _why_not(mode: str, trained: Trained, sampling: Sampling) -> dict[str, str]:
    """Option -> why it does not apply and what to do, of those that do not."""
    reasons: dict[str, str] = {}
    denoising = ("steps", "guidance", "sampler", "eta")
    if mode not in MAKES_PICTURES:
        reasons |= dict.fromkeys(denoising, f"--mode {mode} makes no pictures; leave it out")
    elif trained.writes_codes:
        reasons |= dict.fromkeys(denoising, "this model writes its images as codes, without denoising; leave it out (--temperature draws codes)")
    elif sampling.sampler != "ddim":
        reasons["eta"] = f"the sampler is {sampling.sampler}, and only ddim takes one; add --sampler ddim, or leave it out"
    if mode == "paint":
        reasons["max_new_tokens"] = "--mode paint writes no text; leave it out"
        if not trained.writes_codes:
            reasons["temperature"] = "--mode paint writes no text; leave it out"
    if mode != "interleave":
        reasons["max_images"] = "only --mode interleave begins images of its own; leave it out"
    return reasons


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
