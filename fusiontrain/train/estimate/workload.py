"""What a step consists of: sequences as the plan of the data has them, where there is an index, or as the user says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fusiontrain.config.schema import Config
from fusiontrain.config.validate import has_frozen_prefix
from fusiontrain.config.validate import image_tokens as patches_of_pixels
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

LATENT_DOWNSAMPLING = 8
"""Pixels of `data.image.size` that a side of a latent cell stands for: of the papers' autoencoders."""

NOWHERE = SourceRef("estimate", "nowhere", 0, "")

ImageMaker = Callable[[int], Segment]
"""The segment of an image of so many tokens."""


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


def workload(config: Config, patch_dim: int, text_tokens: int | None, image_tokens: int | None, tokens_per_image: int | None) -> Workload:
    """The sequences of step 0 where the shards of the config are indexed and nothing else is said; else sequences that are all alike.

    patch_dim: numbers of a patch as the model is given it. text_tokens, image_tokens: of every sequence. tokens_per_image: where they depend on the
    files. Raises UserError for numbers that do not fit.
    """
    asked, why_not = (text_tokens, image_tokens, tokens_per_image), None
    if asked == (None, None, None):
        try:
            why_not = _why_not_planned(config)
            if why_not is None:
                return _planned(config, patch_dim)
        except UserError as error:
            why_not = str(error).splitlines()[0]
    sequence, origin = _assumed(config, patch_dim, *asked)
    if why_not is not None:
        origin += f", for there is no plan of the data ({why_not}); --text-tokens and --image-tokens say otherwise"
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
    length, image = config.data.sequence_length, _image_maker(config, patch_dim)
    documents = [tuple(_document(document, image) for document in sequence.documents) for sequence in chosen]
    return Workload(tuple(PackedSequence(found, length, 0) for found in documents), f"{count} of the {len(planned)} sequences of step 1, as the index has them")


def _document(planned: PlannedDocument, image: ImageMaker) -> Document:
    """A document of that shape. Markers stand where `data/documents.py` puts them."""
    images = [place for place in planned.places if place.kind == IMAGE_PIECE]
    edges = planned.num_tokens - sum(place.num_tokens for place in planned.places) - 2 * len(images)
    parts: list[Segment] = [_text(edges)]
    for place in planned.places:
        if place.kind == IMAGE_PIECE and place.num_tokens:
            parts += [_text(1), image(place.num_tokens), _text(1)]
        else:
            parts += [_text(place.num_tokens + 2 * (place.kind == IMAGE_PIECE))]  # of an image that is dropped the markers stay
    return Document(tuple(parts), NOWHERE)


def _assumed(config: Config, patch_dim: int, text: int | None, image: int | None, per_image: int | None) -> tuple[PackedSequence, str]:
    """A sequence full of documents of a text and then an image, or of one text where there are no images."""
    length = config.data.sequence_length
    size, size_origin = _tokens_per_image(config, image, per_image)
    count = _images(length, size, text, image)
    text = length - count * size if text is None else text
    if text < max(1, 2 * count) or text + count * size > length:
        raise UserError(
            f"{text} text tokens and {count} images of {size} tokens: must fit data.sequence_length={length}, with two text tokens around every "
            "image; change --text-tokens, --image-tokens or --tokens-per-image"
        )
    documents, make = max(1, count), _image_maker(config, patch_dim)
    texts = [text // documents + (n < text % documents) for n in range(documents)]
    found = tuple(Document((_text(n - 1), *((make(size), _text(1)) if count else (_text(1),))), NOWHERE) for n in texts)
    images = f" and {count} image{'s' * (count != 1)} of {size:,} tokens{size_origin}, each behind its text"
    origin = f"every sequence has {text:,} text tokens" + (images if size else "")
    if image is not None and image != count * size:
        origin += f"; the {image:,} image tokens that were asked for are {count * size:,}, whole images"
    return PackedSequence(found, length, 0), origin


def _images(length: int, size: int, text: int | None, image: int | None) -> int:
    """Whole images of a sequence: as many as the nearest to what is asked for, or in the room beside the text, or in half of the sequence."""
    if not size:
        return 0
    if image is None:
        return (length - text) // size if text is not None else max(1, length // 2 // size)
    if 0 < image < size:
        raise UserError(f"--image-tokens {image}: is less than one image of {size} tokens; give {size} or more, 0 for text alone, or --tokens-per-image")
    return (2 * image + size) // (2 * size)


def _tokens_per_image(config: Config, image: int | None, given: int | None) -> tuple[int, str]:
    """Tokens of one image, 0 where the model has none, and where the number comes from if it is no fact of the config."""
    data = config.data
    if IMAGE.name not in data.modalities:
        for option, value in (("--image-tokens", image), ("--tokens-per-image", given)):
            if value:
                raise UserError(f"{option} {value}: the model has no images (data.modalities={','.join(data.modalities)}); leave the option out")
        return 0, ""
    patches = patches_of_pixels(config)
    if patches is not None and data.image.resize != "native":
        if given not in (None, patches):
            raise UserError(f"--tokens-per-image {given}: data.image.size and patch_size make it {patches}; change those, or leave the option out")
        return patches, ""
    if given is not None:
        return given, ""
    if patches is not None:
        return patches, " (data.image.max_tokens; --tokens-per-image says otherwise)"
    latents = data.image.representation == "latents"
    side = data.image.size // (LATENT_DOWNSAMPLING if latents else 1) // data.image.patch_size
    cells = f"latents of {data.image.size // LATENT_DOWNSAMPLING} cells a side" if latents else "codes"
    return max(1, side) ** 2, f" ({cells}, for pictures of data.image.size={data.image.size}; --tokens-per-image says otherwise)"


def _text(count: int) -> Segment:
    return Segment(TEXT.name, token_ids=np.zeros(count, np.int64))


def _image_maker(config: Config, patch_dim: int) -> ImageMaker:
    """What makes an image of so many tokens: codes, or patches of `patch_dim` numbers."""
    image = config.data.image

    def codes(count: int) -> Segment:
        return Segment(IMAGE.name, token_ids=np.zeros(count, np.int64))

    def patches(count: int) -> Segment:
        rows = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
        values = np.zeros((count, patch_dim), np.float32)
        return Segment(IMAGE.name, values=values, grid=(rows, count // rows), bidirectional=image.attention == "bidirectional")

    return codes if image.representation == "codes" else patches


def _tokens(document: Document, modality: str) -> int:
    return sum(segment.num_tokens for segment in document.segments if segment.modality == modality)


def describe(batches: Sequence[Batch]) -> dict[str, float]:
    """Means per sequence."""
    count = len(batches)
    found = {f"{name} tokens": sum(batch.token_counts[name] for batch in batches) / count for name in (TEXT.name, IMAGE.name)}
    return {**found, "labelled tokens": sum(batch.target_counts[name] for batch in batches for name in batch.discrete) / count}
