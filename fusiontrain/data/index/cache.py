"""Indexes and token ids on disk: beside the shards in `.fusiontrain-index/`, in the temporary folder where that cannot be written, or in
`data.index_dir`.

A file's name holds a hash of what it depends on (the shard's name, size and time, the format; for tokens the tokenizer too), so one that is
there is right, and a shard that changes gets a new one. Files appear whole under their names: any number of processes may build at once.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusiontrain.config.schema import Config, DataConfig, SourceConfig, TokenizerConfig
from fusiontrain.data.formats.pieces import Representation
from fusiontrain.data.formats.read import source_kind
from fusiontrain.data.index.array_file import ArrayFile, read_about, write_arrays
from fusiontrain.data.index.build import build_index, build_tokens
from fusiontrain.data.index.exclude import excluded_keys, kept_rows
from fusiontrain.data.index.files import Folders, Known, ShardFiles, by_folder, look_up
from fusiontrain.data.index.folder import index_folders
from fusiontrain.data.index.manifest import IndexRow, Measure, Stat, Table, TokensRow, add_to_manifest
from fusiontrain.data.index.shard_index import IMAGE_PIECE, IndexedSource, ShardIndex
from fusiontrain.data.index.tokens import TokenCache, counts_digest
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.storage.shard import Shard, state
from fusiontrain.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_at
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

INDEX, TOKENS = "index", "tokens"
TABLES = ("suffixes", "bad")  # what of an index is not an array

BYTES_PER_PROCESS = 256 << 20
"""Of shards: less takes a process about as long to index as to start."""

Progress = Callable[[int, int], None]
"""Called with the number of shards that were measured, and of those that have to be."""


@dataclass(frozen=True)
class Reading:
    """How shards are read and where what was measured of them is kept: the format of their samples, what of their images, `data.index_dir`."""

    kind: str
    representation: Representation
    index_dir: Path | None = None

    @property
    def index(self) -> Measure[IndexRow]:
        return Measure(INDEX, IndexRow, (self.kind, self.representation))

    def tokens(self, tokenizer: Tokenizer) -> Measure[TokensRow]:
        return Measure(TOKENS, TokensRow, (self.kind, self.representation, tokenizer.fingerprint))


class MeasuredShards(NamedTuple):
    """The indexes and, where a tokenizer was given, the token ids of shards."""

    folders: Folders
    shards: tuple[Shard, ...]
    indexes: ShardFiles[ShardIndex, IndexRow]
    tokens: ShardFiles[TokenCache, TokensRow] | None


def index_sources(sources: Sequence[SourceConfig], data: DataConfig, tokenizer: Tokenizer) -> list[IndexedSource]:
    """Open the index of every source; what is missing is built. Raises UserError for damage and for a source without samples."""
    found = (measure_shards(expand_shards(config.path, data.storage), reading(config, data), tokenizer) for config in sources)
    return [_source(config, number, data, shards) for number, (config, shards) in enumerate(zip(sources, found, strict=True))]


def prepare_sources(config: Config, progress: Progress) -> None:
    """Build what is missing of the indexes of all sources, with as many processes as there are cores and work for. Raises UserError."""
    path = config.data.tokenizer.path or config.model.base
    tokenizer = load_tokenizer(config)
    planned = config.data.sources if config.data.mode == "planned" else ()
    for source in (*planned, *config.data.validation_sources):
        shards = expand_shards(source.path, config.data.storage)
        workers = min(len(os.sched_getaffinity(0)), 1 + sum(stat_of(shard).size for shard in shards) // BYTES_PER_PROCESS)
        spec = None if path is None else (path, config.data.tokenizer)
        measure_shards(shards, reading(source, config.data), tokenizer, workers, spec, progress)


def reading(source: SourceConfig, data: DataConfig) -> Reading:
    """How the shards of a source are read."""
    return Reading(source_kind(source), data.image.representation, None if data.index_dir is None else Path(data.index_dir))


def measure_shards(
    shards: Sequence[Shard], how: Reading, tokenizer: Tokenizer | None, workers: int = 1, tokenizer_source: tuple[str, TokenizerConfig] | None = None,
    progress: Progress = lambda done, total: None,
) -> MeasuredShards:  # fmt: skip
    """Index shards and tokenise their texts, by that many processes, but for those that the manifests know.

    tokenizer_source: what `tokenizer_at` takes, for processes of their own to make the tokenizer from. Raises UserError for the first damaged shard
    and where there is no place to keep an index.
    """
    measures: list[Measure] = [how.index, *([how.tokens(tokenizer)] if tokenizer else [])]
    folders = by_folder(shards)
    found = look_up(folders, _stats(shards), measures, how.index_dir)
    missing = sorted({number for known in found for number, folder in enumerate(known.folders) if folder is None})
    new: dict[tuple[Path, Measure], list] = {}
    try:
        for done, places in enumerate(_measure([shards[n] for n in missing], how, tokenizer, tokenizer_source, workers), 1):
            for known, measure, (folder, row) in zip(found, measures, places, strict=True):
                known.put(missing[done - 1], folder, row)
                new.setdefault((folder, measure), []).append(row)
            progress(done, len(missing))
    finally:  # what was measured before an interrupt need not be looked for again
        for (folder, measure), rows in new.items():
            _add_to_manifest(folder / measure.manifest, measure, rows)
    indexes, *tokens = found
    return MeasuredShards(folders, tuple(shards), _files(indexes, parse_index), _files(tokens[0], parse_tokens) if tokens else None)


def _add_to_manifest(path: Path, measure: Measure, rows: list) -> None:
    try:
        add_to_manifest(path, measure, rows)
    except OSError as error:  # a full disk: what is missing there is found by the names of the files
        logger.warning("%s: cannot be written (%s), so every start will open the files of all its shards", path, error.strerror or error)


def stat_of(shard: Shard) -> Stat:
    """The shard's size and time, or tag, as they are now."""
    return Stat(*state(shard))


def parse_index(file: ArrayFile, path: Path) -> ShardIndex:
    """The index in a mapped file."""
    return ShardIndex(**file.arrays, suffixes=tuple(file.about["suffixes"]), bad=tuple(map(tuple, file.about["bad"])))


def parse_tokens(file: ArrayFile, path: Path) -> TokenCache:
    """The token cache in a mapped file; its ids are read through a descriptor."""
    return TokenCache(path, file.offsets["ids"], file.arrays["ids"].dtype, file.arrays["counts"], file.arrays["start"])


def _source(config: SourceConfig, number: int, data: DataConfig, found: MeasuredShards) -> IndexedSource:
    folders, shards, indexes, tokens = found
    assert tokens is not None
    kept = {}
    lengths = list(indexes.rows.columns["documents"])
    for parent, (places, names) in folders.items():
        excluded = excluded_keys(parent, reading(config, data).index_dir)
        for place, name in zip(places, names, strict=True) if excluded else ():
            if name in excluded:
                kept[place] = kept_rows(indexes[place], excluded[name])
                lengths[place] = len(kept[place])
    source = IndexedSource(config, number, shards, indexes, tokens, kept, tuple(itertools.accumulate(lengths, initial=0)))
    if not len(source):
        bad = source.bad()
        why = f"; the first of {len(bad)} unusable samples is {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise UserError(f"{source.name}: {len(shards)} shards without a usable sample{why}")
    return source


def _files(known: Known, parse: Callable) -> ShardFiles:
    return ShardFiles([folder for folder in known.folders if folder is not None], known.rows, parse)


def _stats(shards: Sequence[Shard]) -> tuple[list[int], list[int | str]]:
    """Sizes, and times or tags."""
    sizes: list[int] = []
    times: list[int | str] = []
    for shard in shards:
        size, time = state(shard)
        sizes.append(size)
        times.append(time)
    return sizes, times


def _measure(
    shards: Sequence[Shard], how: Reading, tokenizer: Tokenizer | None, tokenizer_source: tuple[str, TokenizerConfig] | None, workers: int
) -> Iterator[list[tuple[Path, Any]]]:
    """(folder, row) of the index of each shard and, with a tokenizer, of its tokens, in order; by processes where there are several of both."""
    if min(workers, len(shards)) <= 1 or (tokenizer is not None and tokenizer_source is None):
        yield from (_measure_one(shard, how, tokenizer) for shard in shards)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(shards)), context, initializer=_start_worker, initargs=(tokenizer_source,)) as pool:
        try:
            yield from pool.map(_measure_in_worker, shards, [how] * len(shards))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer_source: tuple[str, TokenizerConfig] | None) -> None:
    global _tokenizer
    _tokenizer = None if tokenizer_source is None else tokenizer_at(*tokenizer_source)


def _measure_in_worker(shard: Shard, how: Reading) -> list[tuple[Path, Any]]:
    return _measure_one(shard, how, _tokenizer)


def _measure_one(shard: Shard, how: Reading, tokenizer: Tokenizer | None) -> list[tuple[Path, Any]]:
    stat = stat_of(shard)
    index = _index_one(shard, stat, how)
    if tokenizer is None:
        return [index]
    return [index, _tokenize_one(shard, stat, ShardFiles([index[0]], Table.of(IndexRow, [index[1]]), parse_index)[0], how, tokenizer)]


def _index_one(shard: Shard, stat: Stat, how: Reading) -> tuple[Path, IndexRow]:
    kept = _kept(shard, stat, how, how.index)
    if kept is not None:
        return kept
    index = build_index(shard, how.kind, how.representation)
    images, text_bytes = int((index.kinds == IMAGE_PIECE).sum()), int(index.text_bytes.sum())
    row = IndexRow(shard.name, *stat, how.index.file(shard, stat), index.digest(), len(index), len(index.bad), images, text_bytes)
    arrays = {field.name: getattr(index, field.name) for field in fields(index) if field.name not in TABLES}
    return _keep(shard, how, row, arrays, {name: getattr(index, name) for name in TABLES})


def _tokenize_one(shard: Shard, stat: Stat, index: ShardIndex, how: Reading, tokenizer: Tokenizer) -> tuple[Path, TokensRow]:
    measure = how.tokens(tokenizer)
    kept = _kept(shard, stat, how, measure)
    if kept is not None:
        return kept
    arrays = build_tokens(shard, index, how.kind, how.representation, tokenizer)
    row = TokensRow(shard.name, *stat, measure.file(shard, stat), counts_digest(arrays["counts"]), int(arrays["start"][-1]))
    return _keep(shard, how, row, arrays, {})


def _kept(shard: Shard, stat: Stat, how: Reading, measure: Measure) -> tuple[Path, Any] | None:
    """A file that no manifest knows, for the process that wrote it was interrupted, or another wrote the manifest at the same time."""
    for folder in index_folders(shard.parent, how.index_dir):
        about = read_about(folder / measure.file(shard, stat))
        if about is not None:
            return folder, measure.row(**about["row"])
    return None


def _keep(shard: Shard, how: Reading, row: Any, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> tuple[Path, Any]:
    """(folder, row) of the file written. Raises UserError where no folder takes it."""
    problems = []
    for folder in index_folders(shard.parent, how.index_dir):
        try:
            write_arrays(folder / row.file, arrays, {"row": row._asdict(), **about})
            return folder, row
        except OSError as error:
            problems.append(f"{folder} ({error.strerror or error})")
    raise UserError(f"{shard}: its index can be kept in none of {', '.join(problems)}; make room there, or set data.index_dir (`data index --out`)")
