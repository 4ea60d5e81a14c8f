"""A small byte-level BPE tokenizer for the demo world, in Hugging Face's `tokenizer.json` format."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fusiontrain.config.schema import TokenizerConfig

VOCAB_SIZE = 512
SPEECH_TOKENS = ("<|speech|>", "<|/speech|>")
"""What opens and closes speech in worlds that have any."""


def world_texts(folder: Path) -> Iterator[str]:
    """Every text of the shards of one split of a demo world, in order."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".json") else None
                if file is not None:
                    yield from (text for text in json.load(file)["texts"] if text)


def write_tokenizer(folder: Path, path: Path, speech: tuple[str, ...] = ()) -> None:
    """Train on the texts of `folder` (a split of a demo world) and write `tokenizer.json` to `path`.

    The special tokens have the names that a config expects by default, and those that open and close `speech`. Every word of the world becomes one
    token.
    """
    names = TokenizerConfig()
    special = [names.begin_text_token, names.end_text_token, names.begin_image_token, names.end_image_token, *speech]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(name, special=True) for name in special if name],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(world_texts(folder), trainer)
    tokenizer.save(str(path))
