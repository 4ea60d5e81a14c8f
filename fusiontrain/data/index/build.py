"""Building the index of a shard, and the token ids of its texts: two walks over the same bytes, each needed at its own time."""

from __future__ import annotations

import itertools
import logging
from array import array
from contextlib import closing

import numpy as np
from isal.isal_zlib import crc32  # ten times as fast as that of zlib
from numpy.typing import DTypeLike

from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import Representation, is_speech, split_page
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.index.shard_index import IMAGE_PIECE, NO_MEMBER, SPEECH_PIECE, TEXT_PIECE, ShardIndex, member_reader
from fusiontrain.data.index.tokens import ids_dtype
from fusiontrain.data.jsonl import samples_of
from fusiontrain.data.modalities.image import image_size
from fusiontrain.data.modalities.speech import num_units
from fusiontrain.data.storage.files import ReadAhead, ShardFile
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.storage.shard import Shard
from fusiontrain.data.tar import TarSample
from fusiontrain.data.tar_runs import Member
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

MOST_SUFFIXES = (1 << 16) - 1
"""What uint16 numbers in `ShardIndex.suffix_ids` can tell apart."""


def build_index(shard: Shard, kind: str, representation: Representation) -> ShardIndex:
    """Walk a shard and measure every sample. Raises UserError when the tar itself is damaged; a bad sample only becomes an entry."""
    builder = _Builder(kind, representation)
    with closing(ReadAhead(open_shard(shard))) as file:
        for number, sample in enumerate(samples_of(file, shard)):
            try:
                builder.add(number, sample, file)
            except BadSample as error:
                offset = min(member.offset for member in sample.members.values())
                builder.bad.append((number, sample.key, f"{error} (at offset {offset})"))
    if builder.bad:
        logger.warning("%s: %d unusable samples, the first is %s: %s", shard, len(builder.bad), *builder.bad[0][1:])
    elif not builder.samples:
        logger.warning("%s: holds no sample", shard)
    return builder.finish()


def build_tokens(shard: Shard, index: ShardIndex, kind: str, representation: Representation, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """`counts`, `start` and `ids` of a TokenCache. Raises UserError when the shard is no longer the one that was indexed."""
    counts = np.zeros(len(index.kinds), np.int32)
    start = np.zeros(len(index) + 1, np.int64)
    dtype = ids_dtype(tokenizer.vocab_size)
    parts: list[np.ndarray] = []
    file = ReadAhead(open_shard(shard))
    try:
        for row in range(len(index)):
            members = index.members(row)
            total, place = 0, int(index.piece_start[row])
            for piece in read_sample(kind, members, member_reader(members, file), representation).pieces:
                if piece.text is not None:
                    ids = np.array(tokenizer.encode(piece.text), dtype)
                    counts[place] = len(ids)
                    total += len(ids)
                    parts.append(ids)
                place += 1
            start[row + 1] = start[row] + total
    except BadSample as error:
        raise UserError(f"{shard}: sample {index.key(row)}: {error}; the shard has changed since it was indexed, index it anew") from error
    finally:
        file.close()
    return {"counts": counts, "start": start, "ids": np.concatenate(parts) if parts else np.zeros(0, dtype)}


class _Builder:
    """Rows that grow sample by sample and become the arrays of a ShardIndex. They lie flat, as numbers: millions of tuples would keep the
    garbage collector busy."""

    def __init__(self, kind: str, representation: Representation) -> None:
        self.kind, self.representation = kind, representation
        self.samples = array("q")  # number, bytes of the key, is_pair, pieces, members
        self.pieces = array("q")  # kind, bytes of text, height, width, member
        self.members = array("q")  # suffix, offset, size, crc
        self.keys = bytearray()
        self.suffixes: dict[str, int] = {}
        self.bad: list[tuple[int, str, str]] = []

    def add(self, number: int, sample: TarSample, file: ShardFile) -> None:
        key, members = sample.key.encode(), sample.members
        data, rows = self._contents(members, file)
        parsed = read_sample(self.kind, members, data.__getitem__, self.representation)
        places = dict(zip(members, range(len(members)), strict=True))
        pieces: list[int] = []
        for text, image, _ in parsed.pieces:
            if text is not None:
                pieces += (TEXT_PIECE, len(text) if text.isascii() else len(text.encode()), 0, 0, NO_MEMBER)
            elif image is not None:  # a page of a member is indexed as a member with the same bytes
                content = data[image if image in data else split_page(image)[0]]
                height, width = (1, num_units(content)) if is_speech(image) else image_size(image, content)
                pieces += (SPEECH_PIECE if is_speech(image) else IMAGE_PIECE, 0, height, width, places.setdefault(image, len(places)))
        self.pieces.extend(pieces)
        for page in itertools.islice(places, len(members), None):
            _, offset, size, _ = members[split_page(page)[0]]
            rows += (self.suffixes.setdefault(page, len(self.suffixes)), offset, size, crc32(data[split_page(page)[0]]))
        self.members.extend(rows)
        if len(self.suffixes) > MOST_SUFFIXES:
            raise UserError(f"sample {sample.key!r}: more than {MOST_SUFFIXES} different suffixes in its shard; name the members of every sample alike")
        self.samples.extend((number, len(key), parsed.is_pair, len(pieces) // 5, len(places)))
        self.keys += key

    def _contents(self, members: dict[str, Member], file: ShardFile) -> tuple[dict[str, bytes], list[int]]:
        """The bytes of a sample's members, and their rows."""
        data: dict[str, bytes] = {}
        rows: list[int] = []
        number_of, read = self.suffixes.setdefault, file.read
        try:
            for suffix, (_, offset, size, _) in members.items():
                data[suffix] = content = read(offset, size)
                rows += (number_of(suffix, len(self.suffixes)), offset, size, crc32(content))
        except OSError as error:
            raise BadSample(f"cannot be read ({error})") from error
        return data, rows

    def finish(self) -> ShardIndex:
        numbers, key_lengths, is_pair, num_pieces, num_members = _columns(self.samples, 5)
        kinds, text_bytes, heights, widths, image_members = _columns(self.pieces, 5)
        suffix_ids, offsets, sizes, crcs = _columns(self.members, 4)
        return ShardIndex(
            numbers=_as(np.int32, numbers),
            key_start=_starts(key_lengths),
            key_bytes=np.frombuffer(bytes(self.keys), np.uint8),
            is_pair=_as(bool, is_pair),
            piece_start=_starts(num_pieces),
            kinds=_as(np.uint8, kinds),
            text_bytes=_as(np.int32, text_bytes),
            heights=_as(np.int32, heights),
            widths=_as(np.int32, widths),
            image_members=_as(np.int32, image_members),
            member_start=_starts(num_members),
            suffix_ids=_as(np.uint16, suffix_ids),
            offsets=_as(np.int64, offsets),
            sizes=_as(np.int64, sizes),
            crcs=_as(np.uint32, crcs),
            suffixes=tuple(self.suffixes),
            bad=tuple(self.bad),
        )


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)], dtype=np.int64)


def _columns(rows: array[int], count: int) -> np.ndarray:
    """[count, rows] int64 of rows that lie one after the other."""
    return np.frombuffer(rows, np.int64).reshape(-1, count).T if rows else np.zeros((count, 0), np.int64)


def _as(dtype: DTypeLike, column: np.ndarray) -> np.ndarray:
    """A column as an array of its own. Raises OverflowError for a number that does not fit."""
    narrow = column.astype(dtype)
    if (narrow != column).any():
        raise OverflowError(f"an index holds a number that is no {np.dtype(dtype)}")
    return narrow
