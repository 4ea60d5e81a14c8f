"""The table of modalities: one row each, and the order in which they lie in a batch.

A batch stores its tokens modality by modality, in the order of `MODALITIES`. Adding a modality is adding a row here,
a decoder under `data/modalities/`, and an embedder under `models/modalities/`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Modality:
    """One kind of token.

    id: its place in the modality-major order. name: the key in configs, metrics and parameter names.
    discrete: tokens are ids of a vocabulary (True) or vectors of numbers (False; where images are stored as codes, those are ids too).
    """

    id: int
    name: str
    discrete: bool


TEXT = Modality(0, "text", discrete=True)
IMAGE = Modality(1, "image", discrete=False)
SPEECH = Modality(2, "speech", discrete=True)

MODALITIES: tuple[Modality, ...] = (TEXT, IMAGE, SPEECH)
MODALITY_NAMES: tuple[str, ...] = tuple(modality.name for modality in MODALITIES)


def table_of(names: Collection[str]) -> tuple[Modality, ...]:
    """The modalities of the batches of data that have `names`: the table up to the last of them, text and images always."""
    last = max([IMAGE.id, *(modality.id for modality in MODALITIES if modality.name in names)])
    return MODALITIES[: last + 1]
