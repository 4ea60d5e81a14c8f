"""Reading a shard and its index again: are their bytes those that were written, and are its images pictures?"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from isal.isal_zlib import crc32

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import is_image, representation_of
from fusiontrain.data.index.array_file import is_as_written
from fusiontrain.data.index.cache import INDEX, TOKENS
from fusiontrain.data.index.shard_index import ShardIndex
from fusiontrain.data.modalities.image import decode_image
from fusiontrain.data.storage.files import ReadAhead, ShardFile
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.storage.shard import Shard
from fusiontrain.data.tar import Member

POLICY = ImageDataConfig(size=32, patch_size=32)


def verify_index(folders: Iterable[Path]) -> list[str]:
    """One sentence for every file of an index or of token ids in these folders that is not as it was written."""
    files = (path for folder in sorted(set(folders)) for what in (INDEX, TOKENS) for path in sorted(folder.glob(f"*.{what}")))
    return [f"{path}: is damaged, or of another version: delete it and run `fusiontrain data index` again" for path in files if not is_as_written(path)]


def verify_shard(shard: Shard, index: ShardIndex) -> list[str]:
    """One sentence for every problem: unusable samples, members whose CRC32 is another, images that do not decode."""
    problems = [f"{shard}: sample {number} ({key}): {reason}" for number, key, reason in index.bad]
    with closing(ReadAhead(open_shard(shard))) as file:
        for row in range(len(index)):
            for member in index.members(row).values():
                problem = _problem(file, member)
                if problem is not None:
                    name = f"sample {index.numbers[row]} ({index.key(row)}), member .{member.name} at offset {member.offset}"
                    problems.append(f"{shard}: {name}: {problem}")
    return problems


def _problem(file: ShardFile, member: Member) -> str | None:
    try:
        data = file.read(member.offset, member.size)
    except OSError as error:
        return f"cannot be read ({error})"
    if crc32(data) != member.crc:
        return f"its bytes have CRC32 {crc32(data):08x}, the index says {member.crc:08x}: fetch or write the shard anew"
    if is_image(member.name) and representation_of(member.name) == "pixels":
        try:
            decode_image(member.name, data, POLICY)
        except BadSample as error:
            return str(error)
    return None
