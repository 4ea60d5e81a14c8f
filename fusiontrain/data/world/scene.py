"""Scenes of the demo world: what an object is, how scenes are drawn at random, and how they are painted.

A scene is one to three objects on a near-white ground of 32x32 pixels. Every object has four attributes - size, color, shape,
place - and no place holds two objects, so a scene can be told in words without loss and read back from its pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

IMAGE_SIZE = 32
BACKGROUND = (245, 245, 245)
# Any two of these, and each and the background, are at least 95 apart in RGB: the nearest one is unambiguous under noise.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 20, 30),
    "orange": (245, 120, 10),
    "yellow": (245, 225, 30),
    "green": (30, 150, 40),
    "cyan": (30, 200, 220),
    "blue": (40, 60, 220),
    "purple": (170, 40, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Radius of the circle in pixels. The other shapes are scaled to similar areas, so that area tells size whatever the shape.
SIZES: dict[str, float] = {"small": 3.6, "large": 6.0}
# Centres in pixels (x, y), in reading order. The centre is only used by scenes of one object: others would touch it.
PLACES: dict[str, tuple[int, int]] = {
    "top left": (8, 8),
    "top right": (24, 8),
    "centre": (16, 16),
    "bottom left": (8, 24),
    "bottom right": (24, 24),
}
CORNERS = tuple(place for place in PLACES if place != "centre")
ATTRIBUTES = ("color", "shape", "size", "place")
# Pairs that training never shows, neither in pictures nor in words: validation asks whether color and shape combine freely.
HELD_OUT_PAIRS = (("red", "cross"), ("blue", "triangle"), ("yellow", "square"), ("green", "circle"))
TILE = 16
_SUPERSAMPLE = 8


@dataclass(frozen=True)
class SceneObject:
    """One object; every attribute is a word of SIZES, COLORS, SHAPES and PLACES."""

    size: str
    color: str
    shape: str
    place: str


Scene = tuple[SceneObject, ...]
"""Objects in reading order of their places."""


def in_reading_order(objects: Sequence[SceneObject]) -> Scene:
    """The same objects ordered by place: left to right, top to bottom."""
    order = list(PLACES)
    return tuple(sorted(objects, key=lambda item: order.index(item.place)))


def has_held_out_pair(scene: Scene) -> bool:
    """Whether some object's color and shape appear together only in validation."""
    return any((item.color, item.shape) in HELD_OUT_PAIRS for item in scene)


def random_look(rng: Random, held_out: bool) -> tuple[str, str, str]:
    """(size, color, shape), uniform; without `held_out`, uniform over the pairs that training may show."""
    while True:
        color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        if held_out or (color, shape) not in HELD_OUT_PAIRS:
            return rng.choice(tuple(SIZES)), color, shape


def random_scene(rng: Random, held_out: bool, num_objects: int | None = None, corners_only: bool = False) -> Scene:
    """A scene of 1 (70%), 2 (20%) or 3 (10%) objects, or of `num_objects`.

    held_out: whether the pairs of HELD_OUT_PAIRS may appear. corners_only: leave out the centre (stories add objects later).
    """
    count = num_objects or rng.choices((1, 2, 3), weights=(70, 20, 10))[0]
    free = list(PLACES) if count == 1 and not corners_only else list(CORNERS)
    places = rng.sample(free, count)
    return in_reading_order([SceneObject(*random_look(rng, held_out), place) for place in places])


@functools.cache
def tile(shape: str, size: str) -> Image.Image:
    """Coverage (0-255, mode L) of an object on a TILE x TILE square with the object's centre in the middle, antialiased."""
    scale = _SUPERSAMPLE
    image = Image.new("L", (TILE * scale, TILE * scale), 0)
    draw = ImageDraw.Draw(image)
    radius = SIZES[size] * scale
    middle = TILE * scale / 2

    def box(half_width: float, half_height: float) -> tuple[float, float, float, float]:
        # Pillow's boxes include their last pixel
        return (middle - half_width, middle - half_height, middle + half_width - 1, middle + half_height - 1)

    if shape == "circle":
        draw.ellipse(box(radius, radius), fill=255)
    elif shape == "square":
        draw.rectangle(box(0.9 * radius, 0.9 * radius), fill=255)
    elif shape == "triangle":
        half, top, bottom = 1.05 * radius, middle - radius, middle + 0.9 * radius
        draw.polygon([(middle, top), (middle + half, bottom), (middle - half, bottom)], fill=255)
    elif shape == "cross":
        draw.rectangle(box(1.03 * radius, 0.36 * radius), fill=255)
        draw.rectangle(box(0.36 * radius, 1.03 * radius), fill=255)
    else:
        raise ValueError(f"shape {shape!r}: must be one of {SHAPES}")
    return image.resize((TILE, TILE), Image.Resampling.BOX)


def render(scene: Scene) -> Image.Image:
    """Paint a scene: RGB, 32x32. A scene has one picture: what its words leave open, a model could only guess."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
    for item in scene:
        x, y = PLACES[item.place]
        corner = (x - TILE // 2, y - TILE // 2)
        image.paste(COLORS[item.color], (*corner, corner[0] + TILE, corner[1] + TILE), tile(item.shape, item.size))
    return image
