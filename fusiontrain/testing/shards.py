"""Small tar shards for tests, written by webdataset's own writer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from fusiontrain.data.index.cache import Reading, measure_shards
from fusiontrain.data.index.shard_index import ShardIndex
from fusiontrain.data.index.tokens import TokenCache
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.tar import Member, members_in
from fusiontrain.data.tokenizer import Tokenizer

AUTO = Reading("auto", "pixels")


def png(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", format: str = "PNG") -> bytes:
    """A picture of noise, (width, height) pixels, as the bytes of a file."""
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "L": 1, "LA": 2}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode=None if mode != "CMYK" else mode).save(buffer, format=format)
    return buffer.getvalue()


def interleaved(texts: Sequence[str | None], images: Sequence[bytes | None]) -> dict[str, Any]:
    """The members of one interleaved document: parallel lists with None where a place is of the other kind."""
    names = [None if image is None else f"{place}.png" for place, image in enumerate(images)]
    members = {name: image for name, image in zip(names, images, strict=True) if name is not None}
    return {"json": json.dumps({"texts": list(texts), "images": names}).encode(), **members}


def write_shard(path: Path, samples: Sequence[Mapping[str, Any]], prefix: str = "sample") -> Path:
    """One shard with the given members by suffix; keys are `<prefix>-<number>`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False) as writer:
        for number, members in enumerate(samples):
            writer.write({"__key__": f"{prefix}-{number:04d}", **members})
    return path


def mixed_samples(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Interleaved documents of several shapes: caption then image, image then caption, text alone, a story of two images."""
    samples = []
    for number in range(first, first + count):
        text, image = f"number {number} is told here", png(number)
        shapes = (
            ([text, None], [None, image]),
            ([None, text], [image, None]),
            ([text], [None]),
            ([text, None, "and then", None], [None, image, None, png(number + 10_000)]),
        )
        samples.append(interleaved(*shapes[number % 4]))
    return samples


def read_members(shard: Path) -> list[Member]:
    """Every member of a tar."""
    with closing(open_shard(shard)) as file:
        return list(members_in(file, shard))


def index_of(shard: Path, how: Reading = AUTO) -> ShardIndex:
    """The index of one shard, kept where a training keeps it."""
    return measure_shards([shard], how, None).indexes[0]


def tokens_of(shard: Path, tokenizer: Tokenizer, how: Reading = AUTO) -> TokenCache:
    """Its token ids, likewise."""
    tokens = measure_shards([shard], how, tokenizer).tokens
    assert tokens is not None
    return tokens[0]


def write_shards(folder: Path, shards: int = 2, samples: int = 12) -> str:
    """A folder of `shards` shards of `mixed_samples`; returns its path as a config takes it."""
    for shard in range(shards):
        write_shard(folder / f"shard-{shard:03d}.tar", mixed_samples(samples, shard * samples), prefix=f"s{shard}")
    return str(folder)


def write_photo_shards(folder: Path, shards: int, samples: int, side: int, images: int = 3) -> str:
    """Interleaved documents as a corpus has them: 100 to 600 words and 1 to 2 * images - 1 JPEGs that are as large as photographs are."""
    generator = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in generator.integers(0, 26, length)) for length in generator.integers(2, 10, 2000)]
    pool = [_photo(generator, side) for _ in range(64)]
    for shard in range(shards):
        documents = []
        for _ in range(samples):
            texts, pictures = list[str | None](), list[bytes | None]()
            for _ in range(generator.integers(1, 2 * images)):
                picked = generator.integers(0, len(words), generator.integers(100, 600) // images)
                texts += [" ".join(words[word] for word in picked), None]
                pictures += [None, pool[generator.integers(0, len(pool))]]
            documents.append(interleaved(texts, pictures))
        write_shard(folder / f"shard-{shard:03d}.tar", documents, prefix=f"s{shard}")
    return str(folder)


def _photo(generator: np.random.Generator, side: int) -> bytes:
    """Smooth colours with some noise: about 15 kB at 256 x 256."""
    coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + generator.integers(-12, 13, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=75)
    return buffer.getvalue()
