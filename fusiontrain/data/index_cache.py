"""Indexes and token ids on disk: in `.fusiontrain-index/` beside local shards, for others in a cache folder (`index_folder.py`).

A file's name holds a hash of what it depends on (the shard's name, size and time, the format; for tokens the tokenizer too), so one that is
there is right, and a shard that changes gets a new one. Files appear whole under their names: any number of processes may build at once.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np

from fusiontrain.config.schema import DataConfig, SourceConfig, TokenizerConfig
from fusiontrain.data.array_file import read_arrays, read_entries, write_arrays
from fusiontrain.data.exclude import kept_rows
from fusiontrain.data.formats.read import source_kind
from fusiontrain.data.index import IndexedSource, ShardIndex
from fusiontrain.data.index_build import build_index, build_tokens
from fusiontrain.data.index_folder import index_folders
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.storage.shard import Shard, digest, state
from fusiontrain.data.token_cache import TokenCache
from fusiontrain.data.tokenizer import Tokenizer, tokenizer_at
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

VERSION = 4
INDEX, TOKENS = "index", "tokens"
TABLES = "tables"  # what of an index is not an array: its suffixes and bad samples, as JSON


def index_sources(sources: Sequence[SourceConfig], data: DataConfig, tokenizer: Tokenizer) -> list[IndexedSource]:
    """Index every shard of every source, from the cache where it is there. Raises UserError for damage and for a source without samples."""
    indexed = []
    latents = data.image.representation == "latents"
    for number, config in enumerate(sources):
        shards, kind = tuple(expand_shards(config.path, data.storage)), source_kind(config)
        indexes = tuple(index_shard(shard, kind, latents) for shard in shards)
        tokens = tuple(tokens_of_shard(shard, index, kind, latents, tokenizer) for shard, index in zip(shards, indexes, strict=True))
        rows = tuple(kept_rows(shard, index) for shard, index in zip(shards, indexes, strict=True))
        starts = np.concatenate([[0], np.cumsum([len(kept) for kept in rows])])
        source = IndexedSource(config, number, shards, indexes, tokens, rows, starts)
        if not len(source):
            bad = source.bad()
            why = f"; the first of {len(bad)} unusable samples is {bad[0][0]}: {bad[0][1]}" if bad else ""
            raise UserError(f"{source.name}: {len(shards)} shards without a usable sample{why}")
        indexed.append(source)
    return indexed


def index_shard(shard: Shard, kind: str, latents: bool) -> ShardIndex:
    """The index of one shard, read from the cache or built and kept there. Raises UserError when the tar is damaged."""
    name = _name(shard, INDEX, kind, latents)
    for folder in index_folders(shard):
        entries = read_entries(folder / name)
        if entries is not None:
            arrays = read_arrays(folder / name, entries)
            tables = json.loads(arrays.pop(TABLES).tobytes())
            return ShardIndex(**arrays, suffixes=tuple(tables["suffixes"]), bad=tuple(map(tuple, tables["bad"])))
    index = build_index(shard, kind, latents)
    tables = json.dumps({"suffixes": index.suffixes, "bad": index.bad}).encode()
    arrays = {field.name: getattr(index, field.name) for field in fields(index) if field.name not in ("suffixes", "bad")}
    _keep(shard, name, {**arrays, TABLES: np.frombuffer(tables, np.uint8)})
    return index


def tokens_of_shard(shard: Shard, index: ShardIndex, kind: str, latents: bool, tokenizer: Tokenizer) -> TokenCache:
    """The token ids of an indexed shard, from the cache or tokenised and kept there. Raises UserError where they cannot be kept."""
    name = _name(shard, TOKENS, kind, latents, tokenizer.fingerprint)
    for folder in index_folders(shard):
        path = folder / name
        entries = read_entries(path)
        if entries is not None:
            return _open_tokens(path)
    kept = _keep(shard, name, build_tokens(shard, index, kind, latents, tokenizer))
    if kept is None:
        raise UserError(f"{shard}: its token ids can be kept in neither of {', '.join(map(str, index_folders(shard)))}; make room in one of them")
    return _open_tokens(kept)


def build_all(
    shards: Sequence[Shard], kind: str, latents: bool, tokenizer: tuple[str, TokenizerConfig] | None, workers: int
) -> Iterator[tuple[Shard, ShardIndex, int | None]]:
    """(shard, index, text tokens) of every shard in order, built where they are not there yet, by that many processes.

    tokenizer: path and config, as `tokenizer_at` takes them; without it no text is tokenised. Raises UserError for the first damaged shard.
    """
    if workers <= 1:
        _start_worker(tokenizer)
        yield from (_build_one(shard, kind, latents) for shard in shards)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(shards)), context, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        try:
            yield from pool.map(_build_one, shards, [kind] * len(shards), [latents] * len(shards))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: tuple[str, TokenizerConfig] | None) -> None:
    global _tokenizer
    _tokenizer = None if tokenizer is None else tokenizer_at(*tokenizer)


def _build_one(shard: Shard, kind: str, latents: bool) -> tuple[Shard, ShardIndex, int | None]:
    index = index_shard(shard, kind, latents)
    if _tokenizer is None:
        return shard, index, None
    return shard, index, int(tokens_of_shard(shard, index, kind, latents, _tokenizer).start[-1])


def _name(shard: Shard, what: str, *depends_on: object) -> str:
    known = repr((VERSION, shard.name, *state(shard), *depends_on))
    return f"{shard.stem}.{digest(known)}.{what}"


def _keep(shard: Shard, name: str, arrays: Mapping[str, np.ndarray]) -> Path | None:
    """The path of the file written; None where no folder takes it."""
    for folder in index_folders(shard):
        try:
            write_arrays(folder / name, arrays)
            return folder / name
        except OSError as error:
            logger.info("%s: nothing can be kept there (%s)", folder, error)
    return None


def _open_tokens(path: Path) -> TokenCache:
    entries = read_entries(path)
    if entries is None:
        raise UserError(f"{path}: it was there a moment ago; is something deleting the index while it is in use?")
    ids = entries.pop("ids")
    return TokenCache(path, ids.offset, np.dtype(ids.dtype), **read_arrays(path, entries))
