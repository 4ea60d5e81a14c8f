"""From a sample's pieces to a document: what stands in it, in which order, and between which markers.

`arrange` decides from numbers alone, so the plan (which has only the index) and the executor (which has the bytes) agree on every length.
A document is `[BOS] text ... BOI <patches> EOI text ... EOS`; codes of an image stand there as tokens, numbered behind
the tokenizer's, and speech likewise between markers of its own, numbered behind those. One that was cut to the length of a sequence has no EOS, for
it does not end there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fusiontrain.config.schema import DataConfig, SourceConfig
from fusiontrain.data.errors import CHANGED, BadSample
from fusiontrain.data.formats.pieces import Fields, Piece, Sample, is_speech
from fusiontrain.data.index.shard_index import IMAGE_PIECE, SPEECH_PIECE, TEXT_PIECE
from fusiontrain.data.modalities.image import decode_codes, image_segment
from fusiontrain.data.modalities.speech import decode_units
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.modality import IMAGE, SPEECH, TEXT
from fusiontrain.types import Document, Segment, SourceRef
from fusiontrain.utils.keyed import keyed_uniform

MARKERS_PER_IMAGE = 2  # BOI and EOI; of speech likewise
_ORDER_DRAW, _DROPOUT_DRAW, _CAPTION_DRAW = 1, 2, 3


@dataclass(frozen=True)
class Draws:
    """The random choices of one visit to one document, keyed by (seed, epoch, source, sample). caption: in [0, 1), which of several is shown."""

    image_first: bool
    drop_condition: bool
    caption: float = 0.0


class Place(NamedTuple):
    """A piece in a document: its number in the sample, how many of its tokens are kept (patches for images), and the first of them."""

    piece: int
    kind: int
    num_tokens: int
    first_token: int = 0


class Arrangement(NamedTuple):
    """A document in numbers: places in reading order, length in tokens, and whether it ends before the sample does (and so has no EOS)."""

    places: tuple[Place, ...]
    num_tokens: int
    cut: bool


def draw(data: DataConfig, source: SourceConfig, key: tuple[int, ...], is_pair: bool, training: bool) -> Draws:
    """The choices for a document; validation never drops a condition. Each draw has a key of its own, so one that is not needed is not made."""
    dropout = data.condition_dropout if training and IMAGE.name in data.modalities else 0.0
    return Draws(
        image_first=is_pair and keyed_uniform(*key, _ORDER_DRAW) < source.image_first_probability,
        drop_condition=dropout > 0 and keyed_uniform(*key, _DROPOUT_DRAW) < dropout,
        caption=keyed_uniform(*key, _CAPTION_DRAW) if is_pair else 0.0,
    )


def arrange(kinds: Sequence[int], tokens: Sequence[int], is_pair: bool, draws: Draws, data: DataConfig, begins: bool) -> tuple[Arrangement, ...]:
    """The documents that a sample becomes: one, or several where `data.oversize: split` splits it, or none.

    kinds and tokens: of the sample's pieces, in its own order; for images their patches. begins: the tokenizer has a BOS. A document that is
    too long is cut in a text or before an image, and what follows is left out or, with `split`, begins a new document; then a text is split
    only if it is longer than a sequence. An image that is longer than a sequence ends the sample, so the last document may be cut.
    """
    order = [piece for piece, kind in enumerate(kinds) if kind != SPEECH_PIECE or SPEECH.name in data.modalities]
    if is_pair:
        order = _pair_order(kinds, order, draws)
    if not order:
        return ()
    images = [piece for piece in order if kinds[piece] == IMAGE_PIECE]
    if draws.drop_condition and len(images) == 1 and order[-1] == images[0]:
        order = images
    arranger = _Arranger(data.sequence_length, begins, splits=data.oversize == "split")
    for piece in order:
        if kinds[piece] == SPEECH_PIECE:
            goes_on = arranger.add_whole(piece, SPEECH_PIECE, tokens[piece])
        elif kinds[piece] == IMAGE_PIECE:
            goes_on = arranger.add_whole(piece, IMAGE_PIECE, tokens[piece] if IMAGE.name in data.modalities else 0)
        else:
            goes_on = arranger.add_text(piece, tokens[piece])
        if not goes_on:
            return arranger.finish(cut=True)
    return arranger.finish(cut=False)


def _pair_order(kinds: Sequence[int], pieces: Sequence[int], draws: Draws) -> list[int]:
    """One of the captions, and the image or speech before or after it."""
    captions = [piece for piece in pieces if kinds[piece] == TEXT_PIECE]
    images = [piece for piece in pieces if kinds[piece] != TEXT_PIECE]
    chosen = captions[int(draws.caption * len(captions))]
    return [*images, chosen] if draws.image_first else [chosen, *images]


class _Arranger:
    """Places pieces one after the other. `room`: tokens left in the document that is being filled, with one kept back for its EOS."""

    def __init__(self, length: int, begins: bool, splits: bool) -> None:
        self.length, self.splits, self.whole_room = length, splits, length - 1 - begins
        self.room, self.places = self.whole_room, list[Place]()
        self.done: list[Arrangement] = []

    def add_whole(self, piece: int, kind: int, num_tokens: int) -> bool:
        """An image or a recording between its markers. False where the sample ends before it."""
        wanted = MARKERS_PER_IMAGE + num_tokens
        if wanted > self.room and not (self.splits and wanted <= self.whole_room):
            return False
        if wanted > self.room:
            self._close(cut=True)
        self.places.append(Place(piece, kind, num_tokens))
        self.room -= wanted
        return True

    def add_text(self, piece: int, num_tokens: int) -> bool:
        """False where the sample ends within this text."""
        if self.splits and self.room < num_tokens <= self.whole_room:
            self._close(cut=True)
        first = 0
        while num_tokens - first > self.room:
            # A document that is cut has no EOS, so one more fits; but the last token is not left over for a document without an EOS.
            kept = self.room + (not self.splits or num_tokens - first > self.room + 1)
            if kept:
                self.places.append(Place(piece, TEXT_PIECE, kept, first))
                self.room -= kept
                first += kept
            if not self.splits:
                return False
            self._close(cut=True)
        self.places.append(Place(piece, TEXT_PIECE, num_tokens - first, first))
        self.room -= num_tokens - first
        return True

    def finish(self, cut: bool) -> tuple[Arrangement, ...]:
        self._close(cut)
        return tuple(self.done)

    def _close(self, cut: bool) -> None:
        if self.places or not cut:
            self.done.append(Arrangement(tuple(self.places), self.length - self.room - cut, cut))
        self.room, self.places = self.whole_room, []


def build_document(sample: Sample, read: Fields, places: Sequence[Place], cut: bool, data: DataConfig, tokenizer: Tokenizer, source: SourceRef) -> Document:
    """The document that `places` describe, without EOS where it was cut. Raises BadSample when the bytes do not give what the index promised."""
    segments: list[Segment] = []
    text: list[Sequence[int] | np.ndarray] = [] if tokenizer.begin_text_id is None else [(tokenizer.begin_text_id,)]
    for number, place in enumerate(places):
        piece = _piece(sample, place)
        if place.kind == TEXT_PIECE:
            ids = tokenizer.encode(piece.text or "") if piece.token_ids is None else piece.token_ids
            # Only the last text of a document that was cut may be longer than its place.
            last = place.first_token + place.num_tokens if cut and number == len(places) - 1 else None
            kept = ids[place.first_token : last]
            _require(len(kept) == place.num_tokens, "a text", len(ids), place.num_tokens)
            text.append(np.asarray(kept, np.int64))
            continue
        if place.kind == SPEECH_PIECE and piece.image is not None:
            assert tokenizer.begin_speech_id is not None and tokenizer.end_speech_id is not None
            units = decode_units(read(piece.image), data.speech.num_units or 0)
            _require(len(units) == place.num_tokens, "speech", len(units), place.num_tokens)
            text.append((tokenizer.begin_speech_id,))
            segments += [_text(text), Segment(SPEECH.name, token_ids=tokenizer.speech_ids(units, data))]
            text = [(tokenizer.end_speech_id,)]
            continue
        text.append((tokenizer.begin_image_id,))
        if IMAGE.name in data.modalities and piece.image is not None and data.image.representation == "codes":
            codes = decode_codes(piece.image, read(piece.image), data.image)
            _require(len(codes) == place.num_tokens, "an image", len(codes), place.num_tokens)
            segments += [_text(text), Segment(IMAGE.name, token_ids=tokenizer.image_ids(codes))]
            text = []
        elif IMAGE.name in data.modalities and piece.image is not None:
            cap = data.image.image_first_noise_cap if number == 0 and len(places) > 1 else 1.0
            segment = image_segment(piece.image, read(piece.image), data.image, cap)
            _require(segment.num_tokens == place.num_tokens, "an image", segment.num_tokens, place.num_tokens)
            segments += [_text(text), segment]
            text = []
        text.append((tokenizer.end_image_id,))
    if not cut:
        text.append((tokenizer.end_text_id,))
    return Document((*segments, *([_text(text)] if text else [])), source)


def _piece(sample: Sample, place: Place) -> Piece:
    """The sample's piece of that place, if it is of the kind that the index says."""
    piece = sample.pieces[place.piece] if place.piece < len(sample.pieces) else None
    if piece is None or _kind(piece) != place.kind:
        raise BadSample("its pieces are not those of the index: the shard has changed since it was indexed", CHANGED)
    return piece


def _kind(piece: Piece) -> int:
    if piece.image is None:
        return TEXT_PIECE
    return SPEECH_PIECE if is_speech(piece.image) else IMAGE_PIECE


def _require(same: bool, what: str, found: int, promised: int) -> None:
    if not same:
        raise BadSample(f"{what} has {found} tokens, the index says {promised}: the shard has changed since it was indexed", CHANGED)


def _text(parts: Sequence[Sequence[int] | np.ndarray]) -> Segment:
    return Segment(TEXT.name, token_ids=np.concatenate(parts, dtype=np.int64))
