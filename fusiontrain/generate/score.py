"""How well a model paints and captions the demo world, by the world's own judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusiontrain.config.schema import Config
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.data.world.judge import Score, mean_shares, score_caption, score_picture
from fusiontrain.data.world.make import WorldDocument, read_split
from fusiontrain.data.world.scene import IMAGE_SIZE, Scene, has_held_out_pair
from fusiontrain.generate.caption import caption
from fusiontrain.generate.paint import paint_as_configured
from fusiontrain.generate.stream import Writing
from fusiontrain.models.fusion import FusionModel


@dataclass(frozen=True)
class Judged:
    """Scores of painting and captioning, as plain data, with what was painted and written."""

    summary: dict[str, float]
    details: dict[str, Any]
    prompts: list[str]
    pictures: list[np.ndarray]
    captions: list[str]


def judge_model(model: FusionModel, tokenizer: Tokenizer, config: Config, world: str | Path, count: int, seed: int) -> Judged:
    """Paint `count` validation captions and caption `count` validation pictures of the demo world in the folder `world`.

    Scenes of one to three objects and held-out pairs come as the split has them. `summary` has color, shape, size, place and caption accuracy:
    shares of objects painted right, and of pictures whose every attribute is told right; it lacks what the split has no documents for.
    Deterministic given `seed`.
    """
    to_paint = _scenes(world, "paint", count)
    to_describe = _scenes(world, "describe", count)
    prompts = [text for text, _, _ in to_paint]
    sample, data = config.sample, config.data
    pictures = paint_as_configured(model, tokenizer, prompts, config, seed)
    writing = Writing(sample.max_new_tokens, sample.temperature, seed)
    shown = [picture for _, picture, _ in to_describe]
    captions = caption(model, tokenizer, shown, image=data.image, writing=writing, context=data.sequence_length)
    painted = [score_picture(_at_world_size(picture), scene) for picture, (_, _, scene) in zip(pictures, to_paint, strict=True)]
    told = [score_caption(text, scene) for text, (_, _, scene) in zip(captions, to_describe, strict=True)]
    paint_details = _by_kind(painted, [scene for _, _, scene in to_paint])
    caption_details = _by_kind(told, [scene for _, _, scene in to_describe])
    shares = paint_details["all"]
    summary = {f"{name}_accuracy": shares[name] for name in ("color", "shape", "size", "place")} if painted else {}
    if told:
        summary["caption_accuracy"] = caption_details["all"]["all_right"]
    return Judged(summary, {"painting": paint_details, "captioning": caption_details}, prompts, pictures, captions)


def _scenes(world: str | Path, kind: str, count: int) -> list[tuple[str, np.ndarray, Scene]]:
    """(caption, picture, scene) of the first `count` validation documents of a kind."""
    found = []
    for document in read_split(world, "validation"):
        if document.kind == kind:
            found.append(_pair(document))
        if len(found) == count:
            break
    return found


def _pair(document: WorldDocument) -> tuple[str, np.ndarray, Scene]:
    text = next(text for text in document.texts if text is not None)
    picture = next(picture for picture in document.pictures if picture is not None)
    scene = next(scene for scene in document.scenes if scene is not None)
    return text, picture, scene


def _at_world_size(picture: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 on the judge's grid: a model may have been trained on the world at another size."""
    if picture.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        return picture
    return np.asarray(Image.fromarray(picture).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def _by_kind(scores: Sequence[Score], scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Mean shares over all, by number of objects, and with or without a color-shape pair that training never showed."""
    kinds: dict[str, Callable[[Scene], bool]] = {
        "all": lambda scene: True,
        "1 object": lambda scene: len(scene) == 1,
        "2 objects": lambda scene: len(scene) == 2,
        "3 objects": lambda scene: len(scene) == 3,
        "pairs seen in training": lambda scene: not has_held_out_pair(scene),
        "with a held-out pair": has_held_out_pair,
    }
    chosen = {name: list(_where(scores, scenes, test)) for name, test in kinds.items()}
    return {name: {"count": len(some), **mean_shares(some)} for name, some in chosen.items() if some or name == "all"}


def _where(scores: Sequence[Score], scenes: Sequence[Scene], test: Callable[[Scene], bool]) -> Iterator[Score]:
    return (score for score, scene in zip(scores, scenes, strict=True) if test(scene))
