"""Building the index of a shard, and the token ids of its texts: two walks over the same bytes, each needed at its own time."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import Latents, split_page
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.index import IMAGE_PIECE, NO_MEMBER, TEXT_PIECE, ShardIndex, member_reader
from fusiontrain.data.jsonl import samples_of
from fusiontrain.data.modalities.image import image_size
from fusiontrain.data.storage.files import ReadAhead, ShardFile
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.storage.shard import Shard
from fusiontrain.data.tar import TarSample
from fusiontrain.data.token_cache import ids_dtype
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

MOST_SUFFIXES = (1 << 16) - 1
"""What uint16 numbers in `ShardIndex.suffix_ids` can tell apart."""


def build_index(shard: Shard, kind: str, latents: Latents) -> ShardIndex:
    """Walk a shard and measure every sample. Raises UserError when the tar itself is damaged; a bad sample only becomes an entry."""
    builder = _Builder(kind, latents)
    with closing(ReadAhead(open_shard(shard))) as file:
        for number, sample in enumerate(samples_of(file, shard)):
            try:
                builder.add(number, sample, file)
            except BadSample as error:
                offset = min(member.offset for member in sample.members.values())
                builder.bad.append((number, sample.key, f"{error} (at offset {offset})"))
    if builder.bad:
        logger.warning("%s: %d unusable samples, the first is %s: %s", shard, len(builder.bad), *builder.bad[0][1:])
    return builder.finish()


def build_tokens(shard: Shard, index: ShardIndex, kind: str, latents: Latents, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
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
            for piece in read_sample(kind, members, member_reader(members, file), latents).pieces:
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
    """Lists that grow sample by sample and become the arrays of a ShardIndex."""

    def __init__(self, kind: str, latents: Latents) -> None:
        self.kind, self.latents = kind, latents
        self.samples: list[tuple[int, bytes, bool, int, int]] = []  # number, key, is_pair, pieces, members
        self.pieces: list[tuple[int, int, int, int, int]] = []  # kind, bytes of text, height, width, member
        self.members: list[tuple[int, int, int, int]] = []  # suffix, offset, size, crc
        self.suffixes: dict[str, int] = {}
        self.bad: list[tuple[int, str, str]] = []

    def add(self, number: int, sample: TarSample, file: ShardFile) -> None:
        try:
            data = {suffix: file.read(member.offset, member.size) for suffix, member in sample.members.items()}
        except OSError as error:
            raise BadSample(f"cannot be read ({error})") from error
        parsed = read_sample(self.kind, sample.members, data.__getitem__, self.latents)
        members, crcs = dict(sample.members), {suffix: zlib.crc32(content) for suffix, content in data.items()}
        for piece in parsed.pieces:
            if piece.image is not None and piece.image not in members:  # a page of a member is indexed as a member with the same bytes
                members[piece.image] = members[split_page(piece.image)[0]]
        places = {suffix: place for place, suffix in enumerate(members)}
        pieces = []
        for piece in parsed.pieces:
            if piece.text is not None:
                pieces.append((TEXT_PIECE, len(piece.text.encode()), 0, 0, NO_MEMBER))
            elif piece.image is not None:
                pieces.append((IMAGE_PIECE, 0, *image_size(piece.image, data[split_page(piece.image)[0]]), places[piece.image]))
        self.pieces += pieces
        for suffix, member in members.items():
            self.members.append((self.suffixes.setdefault(suffix, len(self.suffixes)), member.offset, member.size, crcs[split_page(suffix)[0]]))
        if len(self.suffixes) > MOST_SUFFIXES:
            raise UserError(f"sample {sample.key!r}: more than {MOST_SUFFIXES} different suffixes in its shard; name the members of every sample alike")
        self.samples.append((number, sample.key.encode(), parsed.is_pair, len(pieces), len(members)))

    def finish(self) -> ShardIndex:
        numbers, keys, is_pair, num_pieces, num_members = _columns(self.samples, 5)
        kinds, text_bytes, heights, widths, image_members = _columns(self.pieces, 5)
        suffix_ids, offsets, sizes, crcs = _columns(self.members, 4)
        return ShardIndex(
            numbers=np.array(numbers, np.int32),
            key_start=_starts([len(key) for key in keys]),
            key_bytes=np.frombuffer(b"".join(keys), np.uint8),
            is_pair=np.array(is_pair, bool),
            piece_start=_starts(num_pieces),
            kinds=np.array(kinds, np.uint8),
            text_bytes=np.array(text_bytes, np.int32),
            heights=np.array(heights, np.int32),
            widths=np.array(widths, np.int32),
            image_members=np.array(image_members, np.int32),
            member_start=_starts(num_members),
            suffix_ids=np.array(suffix_ids, np.uint16),
            offsets=np.array(offsets, np.int64),
            sizes=np.array(sizes, np.int64),
            crcs=np.array(crcs, np.uint32),
            suffixes=tuple(self.suffixes),
            bad=tuple(self.bad),
        )


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _columns(rows: Sequence[tuple], count: int) -> list[Sequence]:
    return list(zip(*rows, strict=True)) if rows else [()] * count
