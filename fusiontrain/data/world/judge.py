"""The judge of the demo world: reads pictures back into objects and scores pictures and captions against a scene.

Plain pixel arithmetic, nothing learnt, so its word does not depend on any model: foreground by distance from the ground color,
4-connected components, nearest color of the inner pixels, shape by overlap with the painter's own tiles, place by the nearest
centre, size by area.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fusiontrain.data.world.make import parse_caption
from fusiontrain.data.world.scene import (
    ATTRIBUTES,
    BACKGROUND,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    TILE,
    Scene,
    SceneObject,
    in_reading_order,
    tile,
)

FOREGROUND_DISTANCE = 90.0
"""RGB distance from the ground color from which a pixel is foreground: under half the distance of the nearest color (about 215)."""
MIN_AREA = 10
"""Smaller components are specks (the smallest object covers 26 pixels)."""
_AREA_BETWEEN_SIZES = 62.0


@dataclass(frozen=True)
class Score:
    """How a picture or a caption agrees with a scene.

    num_objects: objects of the scene or found, whichever is more, so that missing and extra objects count as wrong.
    correct: by attribute ("color", "shape", "size", "place"), the number of the scene's objects that have it right.
    """

    num_objects: int
    correct: dict[str, int]

    @property
    def shares(self) -> dict[str, float]:
        """By attribute, the share of objects that have it right."""
        return {name: self.correct[name] / self.num_objects for name in ATTRIBUTES}

    @property
    def all_right(self) -> bool:
        """Every attribute of every object right, none missing, none extra."""
        return all(self.correct[name] == self.num_objects for name in ATTRIBUTES)


def read_scene(pixels: np.ndarray) -> Scene:
    """Read a picture back into objects, in reading order (two may share a place if the picture is not of this world).

    pixels: [H, W, 3] uint8, on the 32x32 grid of the world. Returns () for an empty picture.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels {pixels.shape} {pixels.dtype}: expected [H, W, 3] uint8")
    colors = pixels.astype(np.float32)
    foreground = np.linalg.norm(colors - np.array(BACKGROUND, dtype=np.float32), axis=2) > FOREGROUND_DISTANCE
    return in_reading_order([_read_object(colors, rows, columns) for rows, columns in _components(foreground)])


def _components(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows, columns) of each 4-connected component of a boolean [H, W] mask with at least MIN_AREA pixels."""
    todo = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    found = []
    while todo:
        stack = [todo.pop()]
        component = []
        while stack:
            row, column = stack.pop()
            component.append((row, column))
            near = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)} & todo
            todo -= near
            stack.extend(near)
        if len(component) >= MIN_AREA:
            rows, columns = np.array(component).T
            found.append((rows, columns))
    return found


def _read_object(colors: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> SceneObject:
    """The object that one component shows. colors: [H, W, 3] float32 of 0-255."""
    ground = np.array(BACKGROUND, dtype=np.float32)
    object_pixels = colors[rows, columns]
    # the half that is furthest from the ground: a border half covered by black is as gray as it is green
    distance = np.linalg.norm(object_pixels - ground, axis=1)
    inside = np.median(object_pixels[distance >= np.median(distance)], axis=0)
    color = min(COLORS, key=lambda name: float(np.sum((inside - np.array(COLORS[name], dtype=np.float32)) ** 2)))
    # Coverage of each pixel: how far it lies on the way from the ground to the color. Borders count for what they cover.
    way = np.array(COLORS[color], dtype=np.float32) - ground
    cover = np.clip(np.dot(colors - ground, way) / float(np.dot(way, way)), 0.0, 1.0)
    # one pixel around the component belongs to its antialiased border, but not what noise adds elsewhere
    near = np.zeros(cover.shape, dtype=bool)
    for d_row, d_column in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
        near[np.clip(rows + d_row, 0, near.shape[0] - 1), np.clip(columns + d_column, 0, near.shape[1] - 1)] = True
    cover = np.where(near, cover, 0.0)
    area = float(cover.sum())
    y = float((cover.sum(axis=1) * np.arange(cover.shape[0])).sum() / area)
    x = float((cover.sum(axis=0) * np.arange(cover.shape[1])).sum() / area)
    # pixel centres lie half a pixel from the grid lines in which PLACES is given
    place = min(PLACES, key=lambda name: (PLACES[name][0] - 0.5 - x) ** 2 + (PLACES[name][1] - 0.5 - y) ** 2)
    size = "large" if area > _AREA_BETWEEN_SIZES else "small"
    return SceneObject(size=size, color=color, shape=_nearest_shape(cover, y, x, area), place=place)


@functools.cache
def _templates() -> dict[str, list[tuple[np.ndarray, float, float]]]:
    """By shape: (coverage [TILE, TILE] of 0-1, centroid row, centroid column) of each size."""
    result: dict[str, list[tuple[np.ndarray, float, float]]] = {}
    steps = np.arange(TILE)
    for shape in SHAPES:
        for size in SIZES:
            cover = np.asarray(tile(shape, size), dtype=np.float32) / 255.0
            y = float((cover.sum(axis=1) * steps).sum() / cover.sum())
            x = float((cover.sum(axis=0) * steps).sum() / cover.sum())
            result.setdefault(shape, []).append((cover, y, x))
    return result


def _nearest_shape(cover: np.ndarray, y: float, x: float, area: float) -> str:
    """The shape whose tile, put on the object's centroid give or take a pixel, has the largest intersection over union."""
    padded = np.pad(cover, TILE)
    best, best_overlap = SHAPES[0], -1.0
    for shape, templates in _templates().items():
        for template, template_y, template_x in templates:
            row, column = round(y - template_y) + TILE, round(x - template_x) + TILE
            window = padded[row - 1 : row + TILE + 1, column - 1 : column + TILE + 1]
            shifted = np.lib.stride_tricks.sliding_window_view(window, (TILE, TILE))  # [3, 3, TILE, TILE]
            common = float(np.minimum(shifted, template).sum(axis=(2, 3)).max())
            overlap = common / (area + float(template.sum()) - common)
            if overlap > best_overlap:
                best, best_overlap = shape, overlap
    return best


def score_scene(found: Scene, wanted: Scene) -> Score:
    """Compare objects with objects. Objects at the same place are compared; what is left over is compared in reading order.

    Pairing by place and not by best fit keeps chance at chance: 1/8 for color, 1/4 for shape, 1/2 for size.
    """
    rest = list(found)
    pairs = []
    unpaired = []
    for item in in_reading_order(wanted):
        match = next((other for other in rest if other.place == item.place), None)
        if match is None:
            unpaired.append(item)
            continue
        rest.remove(match)
        pairs.append((item, match))
    pairs += list(zip(unpaired, rest, strict=False))
    correct = {name: sum(getattr(item, name) == getattr(other, name) for item, other in pairs) for name in ATTRIBUTES}
    return Score(num_objects=max(len(found), len(wanted), 1), correct=correct)


def score_picture(pixels: np.ndarray, scene: Scene) -> Score:
    """How well a picture ([H, W, 3] uint8) shows the objects of `scene`."""
    return score_scene(read_scene(pixels), scene)


def score_caption(text: str, scene: Scene) -> Score:
    """How well a caption tells the objects of `scene`; a text that is not a caption has nothing right."""
    return score_scene(parse_caption(text) or (), scene)


def mean_shares(scores: Iterable[Score]) -> dict[str, float]:
    """Over many pictures or captions: by attribute the share of all objects that are right, and "all_right", the share of
    pictures or captions in which everything is. Zeros where there is nothing to score."""
    scores = list(scores)
    total = max(sum(score.num_objects for score in scores), 1)
    shares = {name: sum(score.correct[name] for score in scores) / total for name in ATTRIBUTES}
    shares["all_right"] = sum(score.all_right for score in scores) / max(len(scores), 1)
    return shares
