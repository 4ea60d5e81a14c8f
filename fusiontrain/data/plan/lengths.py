"""Lengths of whole sources, from the index alone and without a loop over documents."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from fusiontrain.config.schema import DataConfig
from fusiontrain.data.documents import MARKERS_PER_IMAGE
from fusiontrain.data.errors import BadSample
from fusiontrain.data.index.shard_index import IMAGE_PIECE, SPEECH_PIECE, TEXT_PIECE, IndexedSource, ShardIndex
from fusiontrain.data.modalities.policy import grid_of
from fusiontrain.data.plan.mixture import MixedSource
from fusiontrain.modality import IMAGE, SPEECH


def patches(height: int, width: int, data: DataConfig) -> int:
    """Tokens of an image of that size. Raises BadSample where patches do not divide it."""
    rows, columns = grid_of(height, width, data.image)
    return rows * columns


def mixed_source(source: IndexedSource, data: DataConfig) -> MixedSource:
    """The source's size, weights and limit for a training. With `data.mix_by: tokens` a weight is divided by the mean length of a document."""
    config = source.config
    scale = Fraction(1)
    if data.mix_by == "tokens":
        shards = range(len(source.shards))
        scale = Fraction(len(source), sum(num_tokens(source.indexes[n], source.tokens[n].counts, source.rows(n), data) for n in shards))
    schedule = ((0, config.weight), *config.weight_schedule)
    # 0.1 is a tenth, not the float nearest to it. Where the schedule begins at 0 it replaces the weight.
    weights = {place: Fraction(str(weight)) * scale for place, weight in schedule}
    return MixedSource(len(source), tuple(weights.items()), config.max_epochs)


def one_pass(size: int) -> MixedSource:
    """A source of a validation: mixed by its size, so that all end together."""
    return MixedSource(size, ((0, Fraction(size)),), 1)


def num_tokens(index: ShardIndex, text_tokens: np.ndarray, rows: np.ndarray, data: DataConfig) -> int:
    """Tokens of the documents `rows` of a shard with their markers (BOS and EOS each count one), before any dropout or cut; of several captions
    the mean.

    text_tokens [p]: of the pieces that are texts. An image without a grid has none.
    """
    kept = np.zeros(len(index), bool)
    kept[rows] = True
    kept_piece = np.repeat(kept, np.diff(index.piece_start))
    is_image = (index.kinds == IMAGE_PIECE) & kept_piece
    total = int(_text_tokens(index, text_tokens)[rows].sum()) + MARKERS_PER_IMAGE * int(is_image.sum()) + 2 * len(rows)
    if SPEECH.name in data.modalities:
        is_speech = (index.kinds == SPEECH_PIECE) & kept_piece
        total += int(index.widths[is_speech].sum(dtype=np.int64)) + MARKERS_PER_IMAGE * int(is_speech.sum())
    if IMAGE.name not in data.modalities:
        return total
    sizes, counts = np.unique(np.stack([index.heights[is_image], index.widths[is_image]]), axis=1, return_counts=True)
    for (height, width), count in zip(sizes.T.tolist(), counts.tolist(), strict=True):
        try:
            total += count * patches(height, width, data)
        except BadSample:
            continue  # such documents are left out and counted as unfit
    return total


def _text_tokens(index: ShardIndex, text_tokens: np.ndarray) -> np.ndarray:
    """Text tokens of every sample, [n] int64; of the mean caption, rounded down, where a visit shows one of several."""
    sums, texts = (
        np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[index.piece_start]) for values in (text_tokens, index.kinds == TEXT_PIECE)
    )
    return np.where(index.is_pair, sums // np.maximum(texts, 1), sums)
