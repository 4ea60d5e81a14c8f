"""The index of a shard: where every member lies, and how long every piece is, so that planning never opens a shard.

It is mapped from its file (`files.py`), whose pages all processes share. It knows neither tokenizer nor size of the images a model sees;
the token ids of its texts are a file of their own (`tokens.py`).
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from isal.isal_zlib import crc32  # ten times as fast as that of zlib

from fusiontrain.config.schema import SourceConfig
from fusiontrain.data.errors import CHECKSUM, READ, BadSample
from fusiontrain.data.formats.pieces import PAGE, Fields
from fusiontrain.data.index.files import ShardFiles
from fusiontrain.data.index.manifest import IndexRow, TokensRow
from fusiontrain.data.index.tokens import TokenCache
from fusiontrain.data.storage.files import ShardFile, Stretch
from fusiontrain.data.storage.shard import Shard, shown_source
from fusiontrain.data.tar import Member
from fusiontrain.types import SourceRef

TEXT_PIECE, IMAGE_PIECE, SPEECH_PIECE = 0, 1, 2
NO_MEMBER = -1


@dataclass(frozen=True)
class ShardIndex:
    """n usable samples of a shard with p pieces and m members in all, and what is wrong with the others. Flat arrays, no numpy strings:
    those are as wide as the longest.

    numbers     [n] int32        place in the shard           is_pair [n] bool
    key_start   [n + 1] int64    key_bytes [.] uint8          keys in a row, UTF-8
    piece_start [n + 1] int64    first piece of a sample      kinds  [p] uint8        TEXT_PIECE, IMAGE_PIECE, SPEECH_PIECE
    text_bytes  [p] int32        of texts, 0 for images       heights, widths [p] int32: of images in pixels or latent cells, 0 for texts,
                                 1 and the number of units for speech
    image_members [p] int32      the image's place among the sample's members; NO_MEMBER for texts
    member_start [n + 1] int64   suffix_ids [m] uint16, into `suffixes`
    offsets, sizes [m] int64     crcs [m] uint32              CRC32 of the member's bytes
    bad         (number, key, reason) of every unusable sample
    """

    numbers: np.ndarray
    key_start: np.ndarray
    key_bytes: np.ndarray
    is_pair: np.ndarray
    piece_start: np.ndarray
    kinds: np.ndarray
    text_bytes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    image_members: np.ndarray
    member_start: np.ndarray
    suffix_ids: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray
    suffixes: tuple[str, ...]
    bad: tuple[tuple[int, str, str], ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def digest(self) -> str:
        """A hash of all that a plan and its documents depend on: not of where the members lie."""
        digest = hashlib.sha256()
        for array in (self.key_start, self.key_bytes, self.is_pair, self.piece_start, self.kinds, self.heights, self.widths, self.sizes, self.crcs):
            digest.update(array.tobytes())
        return digest.hexdigest()[:32]

    def key(self, sample: int) -> str:
        return self.key_bytes[self.key_start[sample] : self.key_start[sample + 1]].tobytes().decode()

    def pieces(self, sample: int) -> slice:
        """The sample's pieces in the arrays of pieces."""
        return slice(int(self.piece_start[sample]), int(self.piece_start[sample + 1]))

    def members(self, sample: int) -> dict[str, Member]:
        """The members of a sample by suffix."""
        found = {}
        for i in range(self.member_start[sample], self.member_start[sample + 1]):
            suffix = self.suffixes[self.suffix_ids[i]]
            found[suffix] = Member(suffix, int(self.offsets[i]), int(self.sizes[i]), int(self.crcs[i]))
        return found


@dataclass(frozen=True)
class IndexedSource:
    """A source of the config with the indexes and token caches of its shards, by the number of the shard.

    kept: of each shard with excluded samples, the rows of its index that are not, [k] int32. starts [shards + 1]: number of the first of them.
    """

    config: SourceConfig
    number: int
    shards: tuple[Shard, ...]
    indexes: ShardFiles[ShardIndex, IndexRow]
    tokens: ShardFiles[TokenCache, TokensRow]
    kept: Mapping[int, np.ndarray]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return self.starts[-1]

    def rows(self, shard: int) -> np.ndarray:
        """The rows [k] int32 of a shard's index that are not excluded."""
        return self.kept[shard] if shard in self.kept else np.arange(len(self.indexes[shard]), dtype=np.int32)

    @property
    def name(self) -> str:
        """Its path in the config, fit to be shown."""
        return shown_source(self.config.path)

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, sample in the shard's index) of the source's sample of that number."""
        shard = bisect.bisect_right(self.starts, sample) - 1
        place = sample - self.starts[shard]
        return shard, int(self.kept[shard][place]) if shard in self.kept else place

    def ref(self, sample: int) -> SourceRef:
        shard, row = self.locate(sample)
        index = self.indexes[shard]
        return SourceRef(self.name, str(self.shards[shard]), int(index.numbers[row]), index.key(row))

    def bad(self) -> list[tuple[SourceRef, str]]:
        """The samples that indexing found unusable, with the reason."""
        return [
            (SourceRef(self.name, str(self.shards[shard]), number, key), reason)
            for shard, unusable in enumerate(self.indexes.rows.columns["unusable"])
            if unusable
            for number, key, reason in self.indexes[shard].bad
        ]


def member_reader(members: dict[str, Member], file: ShardFile) -> Fields:
    """A function from suffix to the bytes of that member of an open shard. Bytes that cannot be read, or are not those that were indexed,
    are a BadSample. Of a shard behind a network all members are fetched at once, and a member of several images is read once for all of them."""
    if file.far and members:
        file = Stretch(file, ((member.offset, member.size) for member in members.values()))

    kept: dict[int, bytes] = {}

    def read(suffix: str) -> bytes:
        member = members[suffix]
        if member.offset in kept:
            return kept[member.offset]
        try:
            data = file.read(member.offset, member.size)
        except OSError as error:
            raise BadSample(f"its .{suffix} cannot be read ({error})", READ) from error
        if member.crc is not None and crc32(data) != member.crc:
            raise BadSample(f"its .{suffix} at offset {member.offset} does not match the CRC32 of the index", CHECKSUM)
        if PAGE in suffix:
            kept[member.offset] = data
        return data

    return read
