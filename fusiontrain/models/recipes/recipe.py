"""What a recipe is: which weights are per modality, and which of them never change."""

from __future__ import annotations

from dataclasses import dataclass

from fusiontrain.modality import MODALITY_NAMES

SHARED = "shared"

Groups = tuple[str, ...]
"""The weight group of each modality, in table order. Modalities of one group are neighbours and use the same weights."""

ONE_FOR_ALL: Groups = (SHARED,) * len(MODALITY_NAMES)
ONE_EACH: Groups = MODALITY_NAMES


@dataclass(frozen=True)
class Recipe:
    """Groups of the three untieable parts of a block (and of the final norm), and the names of the frozen groups.

    frozen_groups also covers the text embedding and LM head when it holds "text" or "shared".
    """

    attention: Groups
    feed_forward: Groups
    final_norm: Groups
    frozen_groups: frozenset[str] = frozenset()

    @property
    def freezes_text(self) -> bool:
        return bool(self.frozen_groups)
