"""What a shard is before it is opened: a name without secrets, what tells one version of it from the next, and where its index is kept."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fusiontrain.config.schema import StorageConfig

PIPE = "pipe:"
GZIP_SUFFIXES = (".tar.gz", ".tgz", ".jsonl.gz")


@dataclass(frozen=True)
class RemoteShard:
    """A tar behind a URL, as it was when the run began.

    size: bytes. tag: its ETag, generation or time of change, "" where the store tells none. Another size or tag later is another shard.
    """

    url: str
    size: int
    tag: str
    settings: StorageConfig

    @property
    def name(self) -> str:
        return urlsplit(self.url).path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def parent(self) -> str:
        return str(self).rpartition("/")[0]

    def __str__(self) -> str:
        return without_secrets(self.url)


@dataclass(frozen=True)
class GzipShard:
    """A compressed shard, which has no random access: it is decompressed into the cache folder before it is read."""

    origin: Path | RemoteShard
    settings: StorageConfig

    @property
    def name(self) -> str:
        return self.origin.name

    @property
    def stem(self) -> str:
        return self.origin.stem

    @property
    def parent(self) -> Path | str:
        return self.origin.parent

    def __str__(self) -> str:
        return str(self.origin)


@dataclass(frozen=True)
class PipeShard:
    """A command whose output is a tar; it is run once, into the cache folder, before that is read."""

    command: str
    settings: StorageConfig

    @property
    def name(self) -> str:
        return "pipe"

    @property
    def stem(self) -> str:
        return self.name

    @property
    def parent(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return shown_source(PIPE + self.command)


Shard = Path | RemoteShard | GzipShard | PipeShard
"""A shard of a source. All can be pickled, hashed and compared, and have a name, a stem and a parent: the folder, a Path of local ones and else a
string. `str` is what errors and logs show."""


def state(shard: Shard) -> tuple[int, int | str]:
    """Size and time of change or tag, of what differs where the content may. Raises OSError where a local file is gone."""
    if isinstance(shard, Path):
        stat = shard.stat()
        return stat.st_size, stat.st_mtime_ns
    if isinstance(shard, RemoteShard):
        return shard.size, shard.tag
    return state(shard.origin) if isinstance(shard, GzipShard) else (0, digest(shard.command))


def common_name(shard: Shard) -> str:
    """A name under which two mentions of the same shard are equal."""
    return str(shard.resolve()) if isinstance(shard, Path) else common_name(shard.origin) if isinstance(shard, GzipShard) else str(shard)


def user_cache() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME/fusiontrain, or ~/.cache/fusiontrain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusiontrain"


def is_remote(path: str) -> bool:
    return "://" in path


def is_local(path: str) -> bool:
    return not is_remote(path) and not path.startswith(PIPE)


def shown_source(path: str) -> str:
    """The path of a source, fit for errors and logs. Of a command: the program, the last argument that looks like a tar, and a hash, for
    arguments may hold tokens and passwords."""
    if not path.startswith(PIPE):
        return without_secrets(path)
    words = path.removeprefix(PIPE).split()
    tars = [without_secrets(word.strip("'\"")) for word in words if ".tar" in word or ".tgz" in word][-1:]
    return " ".join([PIPE + (words[0] if words else ""), *tars, f"[{digest(path)[:8]}]"])


def without_secrets(url: str) -> str:
    """The URL without user, password and query, any of which may open what it names."""
    if not is_remote(url):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def scrubbed(text: object) -> str:
    """A library's message on one line, without user, password and query of the URLs in it."""
    line = " ".join(str(text).split())
    return re.sub(r"\?[^\s'\")>]+", "?...", re.sub(r"://[^/\s@]*@", "://", line))


def digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
