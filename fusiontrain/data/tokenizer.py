"""Text to token ids: any Hugging Face `tokenizer.json`, or bytes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers

from fusiontrain.config.schema import Config, DataConfig, TokenizerConfig
from fusiontrain.data.modalities.speech import num_codes
from fusiontrain.modality import SPEECH
from fusiontrain.utils.errors import UserError

BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"
NUM_BYTES = 256
CODE_TOKEN = re.compile(r"IMGIMG([A-J]+)Z")
"""A code of an image among the tokens of a released Chameleon (arXiv 2405.09818): A to J are the digits of its number."""


@dataclass(frozen=True)
class Tokenizer:
    """encode adds no special tokens and never yields a marker, not for a text that spells one either; decode leaves them out.

    vocab_size: largest id + 1. json: the file's content, None for bytes. code_ids: its own tokens for codes of images, in the order of the codes, where
    it has such, as a released Chameleon's has; the codes of all others stand behind its tokens, and the units of speech behind both.
    """

    vocab_size: int
    begin_text_id: int | None
    end_text_id: int
    begin_image_id: int
    end_image_id: int
    fingerprint: str
    json: str | None
    encode: Callable[[str], list[int]] = field(repr=False)
    decode: Callable[[Sequence[int]], str] = field(repr=False)
    begin_speech_id: int | None = None
    end_speech_id: int | None = None
    code_ids: tuple[int, ...] = field(default=(), repr=False)

    def image_ids(self, codes: np.ndarray) -> np.ndarray:
        """The tokens of codes of an image, [n] int64 both."""
        return np.asarray(self.code_ids, np.int64)[codes] if self.code_ids else self.vocab_size + codes

    def speech_ids(self, units: np.ndarray, data: DataConfig) -> np.ndarray:
        """The tokens of units of speech, [n] int64 both."""
        return self.vocab_size + (0 if self.code_ids else num_codes(data)) + units


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of `data.tokenizer.path`, or of the base's folder. Raises UserError where it, or a special token, is missing."""
    path = config.data.tokenizer.path or config.model.base
    if path is None:
        raise UserError("data.tokenizer.path: must be given where there is no model.base: a folder, a tokenizer.json, or 'bytes'")
    tokenizer = tokenizer_at(path, config.data.tokenizer)
    if SPEECH.name in config.data.modalities and tokenizer.begin_speech_id is None:
        raise UserError("data.tokenizer.begin_speech_token: is not set; speech needs it, and end_speech_token, to stand between them")
    if config.model.vocab_size is not None:
        require_room(config, tokenizer, config.model.vocab_size)
    return tokenizer


def require_room(config: Config, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError unless a model of `vocab_size` tokens has one for each of the tokenizer's, every code of an image and every unit of speech."""
    path, base = config.data.tokenizer.path or config.model.base, config.model.base
    model, mend = (f"model.base={base}", "give the tokenizer that it was made with") if base else (f"model.vocab_size={vocab_size}", "raise it to that")
    codes = num_codes(config.data)
    if codes > len(tokenizer.code_ids) > 0:
        raise UserError(f"data.image.codebook_size={codes}: the tokenizer {path} has tokens for {len(tokenizer.code_ids)} codes; lower it to that")
    if vocab_size < tokenizer.vocab_size:
        raise UserError(f"{model}: the tokenizer {path} has {tokenizer.vocab_size} tokens, the model {vocab_size}; {mend}")
    codes = 0 if tokenizer.code_ids else codes
    units = (config.data.speech.num_units or 0) if SPEECH.name in config.data.modalities else 0
    needed = tokenizer.vocab_size + codes + units
    if vocab_size < needed:
        others = " and ".join(name for name, count in (("the codes of images", codes), ("the units of speech", units)) if count)
        mend = "start without a base, or from one that was trained with them" if base else mend
        raise UserError(f"{model}: the tokenizer's {tokenizer.vocab_size} tokens and {others} need {needed}; {mend}")


def tokenizer_at(path: str, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer in a folder or file, or "bytes"; `config` names its special tokens."""
    return byte_tokenizer(config) if path == BYTES else _from_file(path, config)


def byte_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Byte b is token b; then begin of text, end of text, begin of image, end of image: 260 tokens; where those of speech are named, they follow."""
    speaks = config.begin_speech_token is not None
    return Tokenizer(
        vocab_size=NUM_BYTES + (6 if speaks else 4),
        begin_text_id=None if config.begin_text_token is None else NUM_BYTES,
        end_text_id=NUM_BYTES + 1,
        begin_image_id=NUM_BYTES + 2,
        end_image_id=NUM_BYTES + 3,
        fingerprint=f"bytes, begin_text={config.begin_text_token is not None}",
        json=None,
        encode=lambda text: list(text.encode()),
        decode=lambda ids: bytes(token for token in ids if token < NUM_BYTES).decode(errors="replace"),
        begin_speech_id=NUM_BYTES + 4 if speaks else None,
        end_speech_id=NUM_BYTES + 5 if speaks else None,
    )


def _from_file(path: str, config: TokenizerConfig) -> Tokenizer:
    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such tokenizer; set data.tokenizer.path to a folder with a {TOKENIZER_FILE}, or to 'bytes'")
    text = file.read_text(encoding="utf-8")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file}: not a tokenizer that can be read ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|image|>" in a text is text: no picture would follow that BOI

    def special(key: str) -> int:
        name = getattr(config, key)
        number = tokenizer.token_to_id(name)
        if number is None:
            raise UserError(f"data.tokenizer.{key}={name!r}: {file} has no such token; name one of its own (a reserved one will do)")
        return number

    speech = ("begin_speech_token", "end_speech_token") if config.begin_speech_token is not None else ()
    ids = {key: special(key) for key in ("end_text_token", "begin_image_token", "end_image_token", *speech)}
    begin = None if config.begin_text_token is None else special("begin_text_token")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    code_ids = _code_ids(vocabulary, file)
    markers = {*ids.values(), *([] if begin is None else [begin]), *code_ids}

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    digest = hashlib.sha256(repr([text, begin, *sorted(ids.items()), *code_ids]).encode()).hexdigest()
    return Tokenizer(
        vocab_size=max(vocabulary.values()) + 1,
        begin_text_id=begin,
        end_text_id=ids["end_text_token"],
        begin_image_id=ids["begin_image_token"],
        end_image_id=ids["end_image_token"],
        fingerprint=digest,
        json=text,
        encode=_without(markers - {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}, encode),
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        begin_speech_id=ids.get("begin_speech_token"),
        end_speech_id=ids.get("end_speech_token"),
        code_ids=code_ids,
    )


def _code_ids(vocabulary: Mapping[str, int], file: Path) -> tuple[int, ...]:
    """The ids of the codes 0, 1, ... of images that a vocabulary names itself. Raises UserError where one of them is missing."""
    found = {}
    for token, number in vocabulary.items():
        if match := CODE_TOKEN.fullmatch(token):
            found[int("".join(str(ord(letter) - ord("A")) for letter in match[1]))] = number
    if found.keys() != set(range(len(found))):
        raise UserError(f"{file}: names {len(found)} codes of images (IMGIMG...Z), but not those from 0 to {len(found) - 1}: fetch the file again")
    return tuple(found[code] for code in range(len(found)))


def _without(markers: set[int], encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`encode` less the markers that are ordinary tokens of the file, which its text may spell."""
    if not markers:
        return encode
    return lambda text: [token for token in encode(text) if token not in markers]
