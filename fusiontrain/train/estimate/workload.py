"""What a step consists of: sequences as the plan of the data has them, where there is an index, or as the user says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusiontrain.config.schema import Config
from fusiontrain.config.validate import has_frozen_prefix, image_tokens, uses_images
from fusiontrain.data.collate import collate
from fusiontrain.data.index.cache import index_sources, reading
from fusiontrain.data.index.files import by_folder, look_up
from fusiontrain.data.index.shard_index import IMAGE_PIECE
from fusiontrain.data.plan.plan import Plan, PlannedDocument
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.storage.shard import state
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.modality import IMAGE, TEXT
from fusiontrain.types import Batch, Document, PackedSequence, Segment, SourceRef
from fusiontrain.utils.errors import UserError

SAMPLED_SEQUENCES = 64
"""Of a planned step, evenly spread: enough for a mean, few enough to lay out in seconds."""

NOWHERE = SourceRef("estimate", "nowhere", 0, "")


@dataclass(frozen=True)
class Workload:
    """sequences: of a step, or a sample of them. origin: a sentence on where they come from."""

    sequences: tuple[PackedSequence, ...]
    origin: str

    def batches(self, config: Config) -> list[Batch]:
        """One batch per sequence."""
        return [collate([sequence], config.data, has_frozen_prefix(config)) for sequence in self.sequences]

    def largest_batch(self, config: Config, num_sequences: int) -> Batch:
        """A micro-batch of the sequences with the most image tokens, which need the most memory where text is frozen."""
        by_images = sorted(self.sequences, key=lambda sequence: -sum(_tokens(document, IMAGE.name) for document in sequence.documents))
        return collate([by_images[n % len(by_images)] for n in range(num_sequences)], config.data, has_frozen_prefix(config))


def workload(config: Config, patch_dim: int, text_tokens: int | None, image_tokens: int | None) -> Workload:
    """The sequences of step 0 where the shards of the config are indexed and nothing else is said; else sequences that are all alike.

    patch_dim: numbers of a patch as the model is given it. text_tokens, image_tokens: of every sequence. Raises UserError for numbers that do
    not fit.
    """
    if text_tokens is None and image_tokens is None:
        try:
            why_not = _why_not_planned(config)
            if why_not is None:
                return _planned(config, patch_dim)
        except UserError as error:
            why_not = str(error).splitlines()[0]
        sequence, origin = _assumed(config, patch_dim, None, None)
        return Workload((sequence,), f"{origin}, for there is no plan of the data ({why_not}); --text-tokens and --image-tokens say otherwise")
    sequence, origin = _assumed(config, patch_dim, text_tokens, image_tokens)
    return Workload((sequence,), origin)


def _why_not_planned(config: Config) -> str | None:
    """Why the data have no plan without reading the shards, or None if they have one."""
    if config.data.mode != "planned":
        return f"data.mode={config.data.mode}"
    tokenizer = load_tokenizer(config)
    for source in config.data.sources:
        shards = expand_shards(source.path, config.data.storage)
        how = reading(source, config.data)
        sizes, times = zip(*(state(shard) for shard in shards), strict=True)
        for known in look_up(by_folder(shards), [list(sizes), list(times)], [how.index, how.tokens(tokenizer)], how.index_dir):
            if None in known.folders:
                return f"{source.path} is not indexed: fusiontrain data index"
    return None


def _planned(config: Config, patch_dim: int) -> Workload:
    tokenizer = load_tokenizer(config)
    sources = index_sources(config.data.sources, config.data, tokenizer)
    plan = Plan(config, sources, tokenizer, training=True)
    planned = plan.step(0)
    count = min(SAMPLED_SEQUENCES, len(planned))
    chosen = [planned[n * len(planned) // count] for n in range(count)]
    has_images, length = uses_images(config), config.data.sequence_length
    documents = [tuple(_document(document, has_images, patch_dim) for document in sequence.documents) for sequence in chosen]
    return Workload(tuple(PackedSequence(found, length, 0) for found in documents), f"{count} of the {len(planned)} sequences of step 1, as the index has them")


def _document(planned: PlannedDocument, has_images: bool, patch_dim: int) -> Document:
    """A document of that shape. Markers stand where `data/documents.py` puts them."""
    if not has_images:
        return Document((_text(planned.num_tokens),), NOWHERE)
    images = [place for place in planned.places if place.kind == IMAGE_PIECE]
    edges = planned.num_tokens - sum(place.num_tokens for place in planned.places) - 2 * len(images)
    parts: list[Segment] = [_text(edges)]
    for place in planned.places:
        parts += [_text(1), _image(place.num_tokens, patch_dim), _text(1)] if place.kind == IMAGE_PIECE else [_text(place.num_tokens)]
    return Document(tuple(parts), NOWHERE)


def _assumed(config: Config, patch_dim: int, text: int | None, image: int | None) -> tuple[PackedSequence, str]:
    """A sequence full of documents of a text and then an image, or of one text where there are no images."""
    length = config.data.sequence_length
    size = (image_tokens(config) or (config.data.image.size // config.data.image.patch_size) ** 2) if uses_images(config) else 0
    if image is None:
        image = length // 2 if text is None else length - text
    if not size:
        image = 0
    count = image // size if size else 0
    image = count * size
    text = length - image if text is None else text
    if text < 2 * count or text < 1 or text + image > length:
        raise UserError(
            f"--text-tokens {text} and {count} images of {size} tokens: must fit data.sequence_length={length}, with two tokens around every image"
        )
    documents = max(1, count)
    texts = [text // documents + (n < text % documents) for n in range(documents)]
    found = tuple(Document((_text(n - 1), *((_image(size, patch_dim), _text(1)) if count else (_text(1),))), NOWHERE) for n in texts)
    origin = f"every sequence has {text:,} text tokens" + (f" and {count} images of {size:,} tokens, each behind its text" if size else "")
    return PackedSequence(found, length, 0), origin


def _text(count: int) -> Segment:
    return Segment(TEXT.name, token_ids=np.zeros(count, np.int64))


def _image(count: int, patch_dim: int) -> Segment:
    rows = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    values = np.zeros((count, patch_dim), np.float32)
    return Segment(IMAGE.name, values=values, grid=(rows, count // rows), bidirectional=True)


def _tokens(document: Document, modality: str) -> int:
    return sum(segment.num_tokens for segment in document.segments if segment.modality == modality)



def describe(batches: Sequence[Batch]) -> dict[str, float]:
    """Means per sequence."""
    count = len(batches)
    found = {f"{name} tokens": sum(batch.token_counts[name] for batch in batches) / count for name in (TEXT.name, IMAGE.name)}
    return {**found, "labelled tokens": sum(batch.target_counts[TEXT.name] for batch in batches) / count}
