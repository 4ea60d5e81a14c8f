"""What a recipe is: which parts of the transformer have weights per modality, and which of them never change."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fusiontrain.modality import table_of

SHARED = "shared"

Groups = tuple[str, ...]
"""The weight group of each modality, in table order. Modalities of one group use the same weights."""

Part = Literal["attention_norm", "qkv", "qk_norm", "o", "feed_forward_norm", "feed_forward", "final_norm"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Everything between the embedding and the heads: what can be untied, part by part."""


@dataclass(frozen=True)
class Recipe:
    """The groups of every part of the blocks and of the final norm, and the names of the frozen groups.

    frozen_groups also covers the text embedding and LM head when it holds "text" or "shared".
    """

    attention_norm: Groups
    qkv: Groups
    qk_norm: Groups
    o: Groups
    feed_forward_norm: Groups
    feed_forward: Groups
    final_norm: Groups
    frozen_groups: frozenset[str] = frozenset()

    @property
    def freezes_text(self) -> bool:
        return bool(self.frozen_groups)

    @property
    def num_modalities(self) -> int:
        """M of the batches that the model takes."""
        return len(self.qkv)

    @property
    def groupings(self) -> tuple[Groups, ...]:
        """The groups of every part."""
        return tuple(getattr(self, part) for part in PARTS)


def untie(
    parts: Collection[Part], modalities: Sequence[str], merged: Collection[str] = (), frozen_groups: frozenset[str] = frozenset()
) -> Recipe:
    """The recipe that has weights per modality in `parts` and one for all in the rest.

    modalities: of the data; one that they lack has no weights of its own. merged: modalities that share theirs in all parts, such as all but one.
    """
    apart, together = _one_each(modalities, merged), (SHARED,) * len(table_of(modalities))
    return Recipe(**{part: apart if part in parts else together for part in PARTS}, frozen_groups=frozen_groups)


def _one_each(modalities: Sequence[str], merged: Collection[str]) -> Groups:
    """A group per modality. The rows of one that is missing are none: they go with those before them, so that no border lies between."""
    groups: list[str] = []
    for modality in table_of(modalities):
        own = "_".join(name for name in modalities if name in merged) if modality.name in merged else modality.name
        groups.append(own if modality.name in modalities or not groups else groups[-1])
    return tuple(groups)
