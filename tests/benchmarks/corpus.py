"""A corpus of interleaved documents for benchmarks: 1 to 6 JPEGs of 256 x 256 pixels (about 15 kB each) between texts of 100 to 800 words in all."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image, ImageFilter
from webdataset.writer import TarWriter

IMAGE_POOL = 64
MARKERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|/image|>")


def make_corpus(folder: Path, documents: int = 2000, shards: int = 20) -> Path:
    """Write shards and a tokenizer (BPE of 2,000 tokens, about two to a word) into `folder`; returns the tokenizer's file."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    words = _words(draw, 20_000)
    images = [_jpeg(draw) for _ in range(IMAGE_POOL)]
    per_shard = documents // shards
    for shard in range(shards):
        with TarWriter(str(folder / f"shard-{shard:04d}.tar"), encoder=False) as writer:
            for number in range(per_shard):
                writer.write({"__key__": f"{shard:04d}-{number:06d}", **_document(draw, words, images)})
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    sample = (" ".join(words[i] for i in _ranks(draw, 400, len(words))) for _ in range(500))
    tokenizer.train_from_iterator(sample, vocab_size=2000, special_tokens=list(MARKERS), show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _document(draw: np.random.Generator, words: list[str], images: list[bytes]) -> dict[str, bytes]:
    """The members of one document: `texts` and `images` in parallel lists, one of them null in each place."""
    count = int(draw.integers(1, 7))
    chosen = [words[i] for i in _ranks(draw, int(draw.integers(100, 801)), len(words))]
    cuts = np.sort(draw.integers(0, len(chosen), count))
    texts: list[str | None] = []
    names: list[str | None] = []
    members = {}
    for place, part in enumerate(np.split(np.array(chosen), cuts)):
        if len(part):
            texts, names = [*texts, " ".join(part)], [*names, None]
        if place < count:
            name = f"{place}.jpg"
            members[name] = images[int(draw.integers(len(images)))]
            texts, names = [*texts, None], [*names, name]
    return {"json": json.dumps({"texts": texts, "images": names}).encode(), **members}


def _words(draw: np.random.Generator, count: int) -> list[str]:
    return ["".join(chr(97 + letter) for letter in draw.integers(0, 26, length)) for length in draw.integers(2, 10, count)]


def _ranks(draw: np.random.Generator, count: int, below: int) -> np.ndarray:
    """Numbers of words, frequent ones first, as in a language."""
    return np.minimum(draw.zipf(1.15, count), below) - 1


def _jpeg(draw: np.random.Generator) -> bytes:
    coarse = Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
    noise = Image.fromarray(draw.integers(0, 256, (256, 256, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    buffer = io.BytesIO()
    Image.blend(coarse, noise, 0.35).save(buffer, format="JPEG", quality=75)
    return buffer.getvalue()
