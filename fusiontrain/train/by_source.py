"""What each source of the data gave to a step: documents, tokens and targets, counted on the host, and its part of the losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusiontrain.config.schema import SourceConfig
from fusiontrain.data.storage.shard import PIPE, shown_source
from fusiontrain.modality import MODALITY_NAMES
from fusiontrain.types import IGNORE_INDEX, Batch, LossTerm

NUM_COUNTS = 2 + len(MODALITY_NAMES)


@dataclass(frozen=True)
class SourceCounts:
    """Of one source in one step over all ranks: documents, tokens without padding, and targets by modality."""

    documents: int
    tokens: int
    targets: dict[str, int]


def source_labels(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """{what `SourceRef.source` says: a short name of its own for metrics}, in the order of the sources.

    A source without `name` is called by the last parts of its path, as many as tell it apart, without wildcards and endings: [A-Za-z0-9_.-] alone.
    """
    given = {shown_source(source.path): source.name for source in sources}
    words = {source: _words(source) for source in given}
    labels: dict[str, str] = {}
    for source, mine in words.items():
        others = [other for path, other in words.items() if path != source]
        length = next((n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        label = given[source] or "_".join(mine[-length:])
        labels[source] = next(name for name in (label, *(f"{label}-{n}" for n in range(2, len(words) + 1))) if name not in labels.values())
    return labels


def _words(source: str) -> list[str]:
    """The parts of a path that a person would name it by: `shards/web-{000..127}.tar` -> shards, web."""
    plain = re.sub(r"\{[^}]*\}|\[[^]]*\]|[*?]", "", source.removeprefix(PIPE))
    parts = [re.sub(r"(\.(tar|tgz|gz|zst|jsonl))+$", "", part) for part in re.split(r"[/\s:]+", plain)]
    return [part for part in (re.sub(r"[^A-Za-z0-9_.-]+", "_", part).strip("_.-") for part in parts) if part] or ["source"]


def source_numbers(batch: Batch, sources: Sequence[str]) -> np.ndarray:
    """The number of the source of each document of `batch`, [documents + 1] int64; the last is len(sources): of padding, whose doc id is -1.

    sources: as `SourceRef.source` names them. One that is not among them counts as padding.
    """
    numbers = {source: number for number, source in enumerate(sources)}
    return np.array([*(numbers.get(ref.source, len(sources)) for ref in batch.sources), len(sources)], dtype=np.int64)


def count_by_source(batch: Batch, sources: Sequence[str]) -> np.ndarray:
    """Documents, tokens, and targets of each modality, [2 + M, sources] int64, of a batch on the CPU."""
    of_document = source_numbers(batch, sources)
    of_row = of_document[batch.doc_ids.numpy()]
    counts = [of_document[:-1], of_row, *(_of_targets(batch, name, of_row) for name in MODALITY_NAMES)]
    return np.stack([np.bincount(numbers, minlength=len(sources) + 1)[: len(sources)] for numbers in counts])


def _of_targets(batch: Batch, name: str, of_row: np.ndarray) -> np.ndarray:
    """The source of every target of a modality: an image, or a label."""
    payload = batch.payloads.get(name)
    if payload is None:
        return of_row[(batch.labels.numpy() != IGNORE_INDEX) & (batch.label_modality_ids.numpy() == MODALITY_NAMES.index(name))]
    first_rows = np.unique(payload.image_ids.numpy(), return_index=True)[1] + batch.modality_bounds[MODALITY_NAMES.index(name)]
    return of_row[first_rows[payload.is_target.numpy()]]


def as_counts(flat: Sequence[int], sources: Sequence[str]) -> dict[str, SourceCounts]:
    """The sums of flattened `count_by_source` arrays, by source."""
    table = np.array(flat, dtype=np.int64).reshape(NUM_COUNTS, len(sources)).T.tolist()
    return {
        source: SourceCounts(documents, tokens, dict(zip(MODALITY_NAMES, targets, strict=True)))
        for source, (documents, tokens, *targets) in zip(sources, table, strict=True)
    }


def loss_sums(terms: Mapping[str, LossTerm], doc_ids: torch.Tensor, of_document: torch.Tensor, num_sources: int) -> torch.Tensor:
    """The sum of each modality's loss, then the part of it that each source has: [M + M * sources] float64 on the device.

    doc_ids [T] and of_document [documents + 1] (see `source_numbers`) on the device. A part that is not finite stays that of its own source.
    """
    totals = torch.zeros(len(MODALITY_NAMES), dtype=torch.float64, device=doc_ids.device)
    by_source = totals.new_zeros(len(MODALITY_NAMES), num_sources)
    numbers = torch.arange(num_sources, device=doc_ids.device)[:, None]
    for name, term in terms.items():
        place = MODALITY_NAMES.index(name)
        totals[place] = term.sum.detach()
        if num_sources and term.parts is not None and term.rows is not None:
            sources = of_document[doc_ids[term.rows]]  # [n]
            # One plain sum per source, not a scattered one: the latter adds in any order on a GPU.
            by_source[place] = term.parts.where(sources == numbers, 0).sum(1, dtype=torch.float64)
    return torch.cat([totals, by_source.flatten()])
