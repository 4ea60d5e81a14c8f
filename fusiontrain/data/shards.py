"""Names of shards, in an order that does not depend on the machine, and their open files."""

from __future__ import annotations

import glob
import itertools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusiontrain.config.schema import StorageConfig
from fusiontrain.data.storage import objects
from fusiontrain.data.storage.files import ShardFile, describe, is_http
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.storage.retry import retried
from fusiontrain.data.storage.shard import GZIP_SUFFIXES, PIPE, GzipShard, PipeShard, RemoteShard, Shard, is_remote, without_secrets
from fusiontrain.utils.errors import UserError

BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
NUMBERS = re.compile(r"\{(\d+\.\.\d+)\}")  # all that a shell command's braces may mean to us
RANGE = re.compile(r"(\d+)\.\.(\d+)")
SUFFIXES = (".tar", ".jsonl", *GZIP_SUFFIXES)
REQUESTS_AT_ONCE = 16


def expand_shards(path: str, settings: StorageConfig | None = None) -> list[Shard]:
    """The shards that `path` means: a tar or .jsonl, a folder of them, a glob, or a brace range such as `shard-{000..015}.tar`; sorted by bytes.
    Any of these may be compressed, or a URL, but HTTP knows no folders. `pipe:COMMAND` is a command, or several by ranges of numbers, in the order
    written.

    Raises UserError when there is none, or when a name of a brace range is missing.
    """
    settings = settings or StorageConfig()
    if path.startswith(PIPE):
        return [PipeShard(command, settings) for command in _expand_braces(path.removeprefix(PIPE), NUMBERS)]
    names = [name.removeprefix("file://") for name in _expand_braces(path, BRACES)]
    if is_remote(names[0]):
        found: Sequence[Path | RemoteShard] = sorted(set(_remote(names, settings)), key=lambda shard: os.fsencode(str(shard)))
        if not found:
            raise UserError(f"{without_secrets(path)}: no .tar file or .jsonl there, compressed or not")
    else:
        found = _local(path, names, SUFFIXES)
    return [GzipShard(shard, settings) if str(shard).endswith(GZIP_SUFFIXES) else shard for shard in found]


def expand_paths(path: str, suffixes: Sequence[str]) -> list[Path]:
    """The local files that `path` means, of a folder those with one of the suffixes; sorted by bytes. Raises UserError as `expand_shards` does."""
    return _local(path, _expand_braces(path, BRACES), suffixes)


def _local(path: str, names: list[str], suffixes: Sequence[str]) -> list[Path]:
    shards: list[Path] = []
    for name in names:
        if Path(name).is_dir():
            with os.scandir(name) as entries:  # which knows what is a file without a look at each
                files = {entry.name: entry.is_file() for entry in entries if entry.name.endswith(tuple(suffixes))}
            if odd := sorted(file for file, is_file in files.items() if not is_file):
                raise UserError(f"{Path(name, odd[0])}: not a regular file, so no shard; rename or remove it")
            shards += [entry for entry in Path(name).iterdir() if entry.name in files]
        elif Path(name).is_file():  # before the glob: a name may hold brackets of its own
            shards.append(Path(name))
        elif glob.has_magic(name):
            shards += [Path(found) for found in glob.glob(name) if Path(found).is_file()]
        else:
            said = f"{name} (of {path})" if name != path else name
            raise UserError(f"{said}: no such shard or folder of shards")
    if not shards:
        raise UserError(f"{path}: no file there that ends in {', '.join(suffixes)}")
    by_name = {os.fsencode(shard): shard for shard in shards}
    return [by_name[name] for name in sorted(by_name)]


def _remote(names: list[str], settings: StorageConfig) -> list[RemoteShard]:
    """With their sizes and tags, as their stores tell them now."""

    def look(url: str) -> list[RemoteShard]:
        is_folder = not without_secrets(url).endswith(SUFFIXES)
        if is_http(url) and is_folder and without_secrets(url).endswith("/"):
            raise UserError(f"{without_secrets(url)}: HTTP cannot list a folder; name the shards, for instance by a brace range shard-{{000..015}}.tar")
        where, timeout = without_secrets(url), settings.timeout_seconds
        if is_http(url) or not (is_folder or objects.has_magic(url)):
            return [RemoteShard(url, *retried(lambda: describe(url, timeout), where, settings, first_contact=True), settings)]
        listed = retried(lambda: objects.listing(url, timeout), where, settings, first_contact=True)
        return [RemoteShard(found, size, tag, settings) for found, (size, tag) in listed.items() if found.endswith(SUFFIXES)]

    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="list") as pool:
        return [shard for shards in pool.map(look, names) for shard in shards]


def _expand_braces(path: str, braces: re.Pattern[str]) -> list[str]:
    parts = braces.split(path)  # outside, inside, outside, ...
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    """`0..2,7` means 0, 1, 2 and 7; what is no range of numbers stands for itself."""
    found = []
    for choice in inside.split(","):
        match = RANGE.fullmatch(choice)
        if match is None:
            found.append(choice)
            continue
        first, last = match.groups()
        if int(first) > int(last):
            raise UserError(f"{{{inside}}}: the range {choice} of a source's path runs downwards; write {{{last}..{first}}}")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


class OpenShards:
    """Files of shards, opened on first use. Each thread has its own and at most `limit` of them, so a source may have more shards than a
    process may have open files, and no thread closes what another one reads. A spawned process makes an OpenShards of its own."""

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._open: dict[int, OrderedDict[Shard, ShardFile]] = {}

    def file(self, shard: Shard) -> ShardFile:
        """The shard's file, good until this thread asks for `limit` others. Raises UserError when it cannot be opened."""
        mine = self._open.setdefault(threading.get_ident(), OrderedDict())
        if shard not in mine:
            try:
                mine[shard] = open_shard(shard)
            except OSError as error:
                raise UserError(f"{shard}: cannot be opened ({error.strerror}); it was there when the run began") from error
        mine.move_to_end(shard)
        if len(mine) > self.limit:
            mine.popitem(last=False)[1].close()
        return mine[shard]

    def close(self) -> None:
        """Close them all; no thread may be reading."""
        while self._open:
            for file in self._open.popitem()[1].values():
                file.close()
