"""Text to token ids: any Hugging Face `tokenizer.json`, or bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers

from fusiontrain.config.schema import Config, TokenizerConfig
from fusiontrain.data.modalities.speech import num_codes
from fusiontrain.modality import SPEECH
from fusiontrain.utils.errors import UserError

BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"
NUM_BYTES = 256


@dataclass(frozen=True)
class Tokenizer:
    """encode adds no special tokens and never yields a marker, not for a text that spells one either; decode leaves them out.

    vocab_size: largest id + 1. json: the file's content, None for bytes.
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


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of `data.tokenizer.path`, or of the base's folder. Raises UserError where it, or a special token, is missing."""
    path = config.data.tokenizer.path or config.model.base
    if path is None:
        raise UserError("data.tokenizer.path: must be given where there is no model.base: a folder, a tokenizer.json, or 'bytes'")
    tokenizer = tokenizer_at(path, config.data.tokenizer)
    if SPEECH.name in config.data.modalities and tokenizer.begin_speech_id is None:
        raise UserError("data.tokenizer.begin_speech_token: is not set; speech needs it, and end_speech_token, to stand between them")
    _require_room_for_codes(config, tokenizer)
    if config.model.vocab_size is not None and config.model.vocab_size < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size={config.model.vocab_size}: the tokenizer {path} has {tokenizer.vocab_size} tokens; raise it to that")
    return tokenizer


def _require_room_for_codes(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError unless the model has a token for every code of an image and unit of speech behind those of the tokenizer."""
    units = (config.data.speech.num_units or 0) if SPEECH.name in config.data.modalities else 0
    codes, vocab_size = num_codes(config.data), config.model.vocab_size
    needed = tokenizer.vocab_size + codes + units
    if codes + units and vocab_size is not None and vocab_size < needed:
        others = " and ".join(name for name, count in (("the codes of images", codes), ("the units of speech", units)) if count)
        raise UserError(f"model.vocab_size={vocab_size}: the tokenizer's {tokenizer.vocab_size} tokens and {others} need {needed}; raise it to that")


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
    markers = {*ids.values(), *([] if begin is None else [begin])}

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    digest = hashlib.sha256(repr([text, begin, *sorted(ids.items())]).encode()).hexdigest()
    return Tokenizer(
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
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
    )


def _without(markers: set[int], encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`encode` less the markers that are ordinary tokens of the file, which its text may spell."""
    if not markers:
        return encode
    return lambda text: [token for token in encode(text) if token not in markers]
