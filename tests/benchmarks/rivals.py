"""The same work with webdataset, as its README shows it: WebDataset -> shuffle -> decode -> map, and WebLoader with worker processes.

What is measured is the loader, so all that is ours to choose is as fast here as it can be: FusionTrain's functions cut patches and pack. What each does:

- FusionTrain: members by offset, CRC32, token ids from a cache; JPEGs by simplejpeg; labels and mask intervals besides.
- webdataset: reads shards from end to end; `decode("rgb8")` is Pillow to RGB arrays ("Decoding" of its README; its other image formats make
  floating point numbers, at more cost); text by the tokenizer; packing is a stage of one's own (`compose`), best fit decreasing over 256 documents.
- Megatron-Energon (`rivals_energon.py`): the same `Encoder` in a cooker and in its own packing stages, images by its `SampleDecoder`.

All give the trainer token ids, documents, positions, and float32 patches in [-1, 1] of pictures of 256 x 256 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageOps

from fusiontrain.data.modalities.image import patchify
from fusiontrain.data.plan.packing import best_fit_decreasing

LENGTH, BUFFER, SHUFFLE = 8192, 256, 100
SIZE, SIDE, PATCHES = 256, 16, 256


class Encoder:
    """A document in the members of a sample to token ids and images; sequences from documents. The same for both rivals."""

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer))
        self.begin, self.end, self.begin_image, self.end_image = (
            self.tokenizer.token_to_id(name) for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|/image|>")
        )

    def encode(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The members of a sample, decoded or as bytes."""
        document = sample["json"] if isinstance(sample["json"], dict) else json.loads(sample["json"])
        ids, images = [self.begin], []
        for text, image in zip(document["texts"], document["images"], strict=True):
            if text is not None:
                ids += self.tokenizer.encode(text, add_special_tokens=False).ids
            else:
                ids += [self.begin_image, *[0] * PATCHES, self.end_image]
                images.append(patches(sample[image]) if isinstance(sample[image], np.ndarray) else sample[image])
        return {"ids": np.array([*ids, self.end][:LENGTH], np.int64), "images": images}

    def pack(self, documents: list[dict[str, Any]]) -> dict[str, Any]:
        """A sequence [8192] of token ids, documents and positions, and its images: patches [n * 256, 768] uint8 where they were decoded."""
        ids, doc_ids, positions = np.zeros(LENGTH, np.int64), np.full(LENGTH, -1, np.int32), np.zeros(LENGTH, np.int32)
        first = 0
        for number, document in enumerate(documents):
            last = first + len(document["ids"])
            ids[first:last], doc_ids[first:last], positions[first:last] = document["ids"], number, np.arange(last - first)
            first = last
        images = [image for document in documents for image in document["images"]]
        pixels = torch.from_numpy(np.concatenate(images)) if images and isinstance(images[0], np.ndarray) else images
        arrays = {"input_ids": ids, "doc_ids": doc_ids, "position_ids": positions}
        return {**{name: torch.from_numpy(array) for name, array in arrays.items()}, "pixels": pixels, "documents": len(documents)}

    def groups(self, documents: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [[documents[i] for i in group] for group in best_fit_decreasing([len(document["ids"]) for document in documents], LENGTH)]


def patches(pixels: np.ndarray) -> np.ndarray:
    """Pixels [H, W, 3] uint8, cropped and resized if they are not of 256 x 256, as patches [256, 768] uint8."""
    if pixels.shape[:2] != (SIZE, SIZE):
        pixels = np.asarray(ImageOps.fit(Image.fromarray(pixels), (SIZE, SIZE), Image.Resampling.BICUBIC))
    return patchify(pixels.transpose(2, 0, 1), SIDE)


def finished(sequence: dict[str, Any]) -> dict[str, Any]:
    """A sequence from a worker with its patches as numbers in [-1, 1]: made by the trainer, so that workers send a quarter of the bytes."""
    pixels = sequence["pixels"]
    return {**sequence, "pixels": pixels.to(torch.float32).div_(127.5).sub_(1)} if isinstance(pixels, torch.Tensor) else sequence


def webdataset_sequences(folder: Path, tokenizer: Path, workers: int, epochs: int, decode: bool) -> Iterator[dict[str, Any]]:
    """Packed sequences of that many passes over the shards."""
    import webdataset as wds

    encoder = Encoder(tokenizer)

    def packed(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        buffer = []
        for sample in samples:
            buffer.append(sample)
            if len(buffer) == BUFFER:
                yield from map(encoder.pack, encoder.groups(buffer))
                buffer = []
        yield from map(encoder.pack, encoder.groups(buffer))

    shards = sorted(map(str, folder.glob("*.tar")))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).repeat(epochs).shuffle(SHUFFLE)
    if decode:
        dataset = dataset.decode("rgb8")
    dataset = dataset.map(encoder.encode).compose(packed)
    yield from map(finished, wds.WebLoader(dataset, batch_size=None, num_workers=workers))
