"""The tokenizer of an exported model, as files that `transformers` reads too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from fusiontrain.data.tokenizer import BYTES, NUM_BYTES, TOKENIZER_FILE, Tokenizer
from fusiontrain.train.sources import Source

TOKENIZER_CONFIG = "tokenizer_config.json"
BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", "generation_config.json", "chat_template.jinja", "chat_template.json")
"""What may lie beside a tokenizer.json and is copied with it."""


def write_tokenizer_files(folder: Path, source: Source, tokenizer: Tokenizer | None, kind: str) -> None:
    """tokenizer.json and what lies beside it, as they are; the built-in tokenizer of bytes is written as one where others are to read it."""
    if tokenizer is None:  # a Llama of others: what it has
        _copy(source.folder, folder, (TOKENIZER_FILE, *BESIDE))
        return
    if tokenizer.json is not None:
        (folder / TOKENIZER_FILE).write_text(tokenizer.json, encoding="utf-8")
        origin = Path(source.config.data.tokenizer.path or source.config.model.base or BYTES)
        _copy(origin if origin.is_dir() else origin.parent, folder, BESIDE)
    elif kind == "huggingface":
        (folder / TOKENIZER_FILE).write_text(_bytes_json(source), encoding="utf-8")
    if (folder / TOKENIZER_FILE).is_file() and not (folder / TOKENIZER_CONFIG).is_file():
        names = source.config.data.tokenizer
        known = {"bos_token": names.begin_text_token, "eos_token": names.end_text_token}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{key: name for key, name in known.items() if name is not None}}
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _copy(origin: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


def _bytes_json(source: Source) -> str:
    """The built-in tokenizer: byte b is token b, then the markers."""
    letters = _letters_of_bytes()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = source.config.data.tokenizer
    begin = names.begin_text_token or "<|begin_of_text|>"
    markers = (begin, names.end_text_token, names.begin_image_token, names.end_image_token)
    tokenizer.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    assert [tokenizer.token_to_id(marker) for marker in markers] == list(range(NUM_BYTES, NUM_BYTES + len(markers)))
    return tokenizer.to_str(pretty=True)


def _letters_of_bytes() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: its own where it can be seen, or one behind all bytes."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(NUM_BYTES) if byte not in seen]
    return [chr(byte) if byte in seen else chr(NUM_BYTES + hidden.index(byte)) for byte in range(NUM_BYTES)]
