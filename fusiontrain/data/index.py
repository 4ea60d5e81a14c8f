"""The index of a shard: where every member lies, and how long every piece is, so that planning never opens a shard.

Built once per (shard, tokenizer, format) and kept beside the shards in `.fusiontrain-index/`, or in the temporary folder where that
cannot be written. A shard that changes (size or time) gets a new one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from fusiontrain.config.schema import DataConfig, SourceConfig
from fusiontrain.data.errors import READ, BadSample
from fusiontrain.data.formats.pieces import Fields
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.modalities.image import image_size
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.tar import Member, TarSample, read_bytes, read_samples
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.types import SourceRef
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

VERSION = 3
FOLDER = ".fusiontrain-index"
TEXT_PIECE, IMAGE_PIECE = 0, 1


@dataclass(frozen=True)
class ShardIndex:
    """n usable samples of a shard with p pieces and m members in all, and what is wrong with the others.

    numbers     [n] int32        place in the shard           keys   [n] str          is_pair [n] bool
    piece_start [n + 1] int64    first piece of a sample      kinds  [p] uint8        TEXT_PIECE or IMAGE_PIECE
    tokens      [p] int32        of texts, 0 for images       heights, widths [p] int32: of images in pixels or latent cells, 0 for texts
    member_start [n + 1] int64   suffixes [m] str             offsets, sizes [m] int64
    bad_numbers [b] int32        bad_keys [b] str             bad_reasons [b] str
    """

    numbers: np.ndarray
    keys: np.ndarray
    is_pair: np.ndarray
    piece_start: np.ndarray
    kinds: np.ndarray
    tokens: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    member_start: np.ndarray
    suffixes: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    bad_numbers: np.ndarray
    bad_keys: np.ndarray
    bad_reasons: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def members(self, sample: int) -> dict[str, Member]:
        """The members of a sample by suffix."""
        span = range(self.member_start[sample], self.member_start[sample + 1])
        return {str(self.suffixes[i]): Member(str(self.suffixes[i]), int(self.offsets[i]), int(self.sizes[i])) for i in span}


@dataclass(frozen=True)
class IndexedSource:
    """A source of the config with the indexes of its shards. `starts` [shards + 1]: number of the first sample of each shard."""

    config: SourceConfig
    number: int
    shards: tuple[Path, ...]
    indexes: tuple[ShardIndex, ...]
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, sample in the shard's index) of the source's sample of that number."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def ref(self, sample: int) -> SourceRef:
        shard, row = self.locate(sample)
        index = self.indexes[shard]
        return SourceRef(self.config.path, str(self.shards[shard]), int(index.numbers[row]), str(index.keys[row]))

    def bad(self) -> list[tuple[SourceRef, str]]:
        """The samples that indexing found unusable, with the reason."""
        return [
            (SourceRef(self.config.path, str(shard), int(number), str(key)), str(reason))
            for shard, index in zip(self.shards, self.indexes, strict=True)
            for number, key, reason in zip(index.bad_numbers, index.bad_keys, index.bad_reasons, strict=True)
        ]


def index_sources(sources: Sequence[SourceConfig], data: DataConfig, tokenizer: Tokenizer) -> list[IndexedSource]:
    """Index every shard of every source, from the cache where it is there. Raises UserError for damage and for a source without samples."""
    indexed = []
    for number, config in enumerate(sources):
        shards = tuple(expand_shards(config.path))
        indexes = tuple(index_shard(shard, config.format, data.image.representation == "latents", tokenizer) for shard in shards)
        starts = np.concatenate([[0], np.cumsum([len(index) for index in indexes])])
        source = IndexedSource(config, number, shards, indexes, starts)
        if not len(source):
            bad = source.bad()
            why = f"; the first of {len(bad)} unusable samples is {bad[0][0]}: {bad[0][1]}" if bad else ""
            raise UserError(f"{config.path}: {len(shards)} shards without a usable sample{why}")
        indexed.append(source)
    return indexed


def index_shard(shard: Path, kind: str, latents: bool, tokenizer: Tokenizer) -> ShardIndex:
    """The index of one shard, read from the cache or built and cached."""
    stat = shard.stat()
    identity = repr((VERSION, shard.name, stat.st_size, stat.st_mtime_ns, kind, latents, tokenizer.fingerprint))
    name = f"{shard.stem}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    for folder in _cache_folders(shard):
        index = _load(folder / name)
        if index is not None:
            return index
    index = build_index(shard, kind, latents, tokenizer)
    for folder in _cache_folders(shard):
        try:
            _save(index, folder / name)
            break
        except OSError as error:
            logger.info("%s: the index cannot be kept there (%s)", folder, error)
    return index


def _cache_folders(shard: Path) -> tuple[Path, Path]:
    where = hashlib.sha256(os.fsencode(shard.parent.resolve())).hexdigest()[:16]
    return shard.parent / FOLDER, Path(tempfile.gettempdir()) / f"fusiontrain-index-{os.getuid()}" / where


def _load(cached: Path) -> ShardIndex | None:
    """None where there is no such index, or one that a full disk or a crash left damaged."""
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            return ShardIndex(**arrays)
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def _save(index: ShardIndex, cached: Path) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has, on no other machine that shares the disk either: process numbers repeat between containers.
    descriptor, partial = tempfile.mkstemp(dir=cached.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **{field.name: getattr(index, field.name) for field in fields(index)})
        os.chmod(partial, 0o644)
        os.replace(partial, cached)
    except BaseException:
        os.unlink(partial)
        raise


def build_index(shard: Path, kind: str, latents: bool, tokenizer: Tokenizer) -> ShardIndex:
    """Walk a shard and measure every sample. Raises UserError when the tar itself is damaged; a bad sample only becomes an entry."""
    builder = _Builder(kind, latents, tokenizer)
    with shard.open("rb") as file:
        for number, sample in enumerate(read_samples(shard)):
            try:
                builder.add(number, sample, file.fileno())
            except BadSample as error:
                builder.bad.append((number, sample.key, str(error)))
    if builder.bad:
        logger.warning("%s: %d unusable samples, the first is %s: %s", shard, len(builder.bad), *builder.bad[0][1:])
    return builder.finish()


class _Builder:
    """Lists that grow sample by sample and become the arrays of a ShardIndex."""

    def __init__(self, kind: str, latents: bool, tokenizer: Tokenizer) -> None:
        self.kind, self.latents, self.tokenizer = kind, latents, tokenizer
        self.samples: list[tuple[int, str, bool, int, int]] = []  # number, key, is_pair, pieces, members
        self.pieces: list[tuple[int, int, int, int]] = []  # kind, tokens, height, width
        self.members: list[tuple[str, int, int]] = []
        self.bad: list[tuple[int, str, str]] = []

    def add(self, number: int, sample: TarSample, descriptor: int) -> None:
        read = member_reader(sample.members, descriptor)
        parsed = read_sample(self.kind, sample.members, read, self.latents)
        pieces = []
        for piece in parsed.pieces:
            if piece.text is not None:
                pieces.append((TEXT_PIECE, len(self.tokenizer.encode(piece.text)), 0, 0))
            elif piece.image is not None:
                pieces.append((IMAGE_PIECE, 0, *image_size(piece.image, read(piece.image))))
        self.pieces += pieces
        self.members += [(suffix, member.offset, member.size) for suffix, member in sample.members.items()]
        self.samples.append((number, sample.key, parsed.is_pair, len(pieces), len(sample.members)))

    def finish(self) -> ShardIndex:
        numbers, keys, is_pair, num_pieces, num_members = _columns(self.samples, 5)
        kinds, tokens, heights, widths = _columns(self.pieces, 4)
        suffixes, offsets, sizes = _columns(self.members, 3)
        bad_numbers, bad_keys, bad_reasons = _columns(self.bad, 3)
        return ShardIndex(
            numbers=np.array(numbers, np.int32),
            keys=np.array(keys, np.str_),
            is_pair=np.array(is_pair, bool),
            piece_start=np.concatenate([[0], np.cumsum(num_pieces, dtype=np.int64)]).astype(np.int64),
            kinds=np.array(kinds, np.uint8),
            tokens=np.array(tokens, np.int32),
            heights=np.array(heights, np.int32),
            widths=np.array(widths, np.int32),
            member_start=np.concatenate([[0], np.cumsum(num_members, dtype=np.int64)]).astype(np.int64),
            suffixes=np.array(suffixes, np.str_),
            offsets=np.array(offsets, np.int64),
            sizes=np.array(sizes, np.int64),
            bad_numbers=np.array(bad_numbers, np.int32),
            bad_keys=np.array(bad_keys, np.str_),
            bad_reasons=np.array(bad_reasons, np.str_),
        )


def _columns(rows: Sequence[tuple], count: int) -> list[Sequence]:
    return list(zip(*rows, strict=True)) if rows else [()] * count


def member_reader(members: dict[str, Member], descriptor: int) -> Fields:
    """A function from suffix to the bytes of that member of an open shard. Unreadable bytes are a BadSample."""

    def read(suffix: str) -> bytes:
        member = members[suffix]
        try:
            return read_bytes(descriptor, member.offset, member.size)
        except OSError as error:
            raise BadSample(f"its .{suffix} cannot be read ({error})", READ) from error

    return read
