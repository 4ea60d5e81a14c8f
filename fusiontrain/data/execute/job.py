"""What trainer and worker processes say to each other, beside file descriptors."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusiontrain.config.schema import DataConfig, SourceConfig
from fusiontrain.data.arena import Arena
from fusiontrain.data.execute.build import Built
from fusiontrain.data.index.shard_index import IndexedSource
from fusiontrain.data.plan.plan import PlannedSequence
from fusiontrain.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """What a worker builds from, sent to it once. name: a hash of the rest; index: of the samples that the plan's numbers mean."""

    sources: tuple[SourceConfig, ...]
    data: DataConfig
    tokenizer: Tokenizer
    frozen_prefix: bool
    index: str
    name: str


@dataclass(frozen=True)
class MapRing:
    """A ring of that name, `nbytes` long, whose descriptor follows."""

    ring: int
    nbytes: int


@dataclass(frozen=True)
class DropRing:
    """A ring that is not used any more."""

    ring: int


@dataclass(frozen=True)
class Task:
    """A micro-batch to be built into `nbytes` of a ring from `offset` on."""

    job: str
    ring: int
    offset: int
    nbytes: int
    sequences: tuple[PlannedSequence, ...]


@dataclass(frozen=True)
class Failure:
    """The answer in place of another. by_user: the message is a sentence for the user, else a traceback."""

    message: str
    by_user: bool


def make_job(sources: Sequence[IndexedSource], data: DataConfig, tokenizer: Tokenizer, frozen_prefix: bool = False) -> Job:
    """The job of building from sources that this process has indexed."""
    configs = tuple(source.config for source in sources)
    # The ids come from the token cache, so a worker needs no vocabulary, and the functions of a tokenizer cannot be sent.
    ids_alone = dataclasses.replace(tokenizer, json=None, encode=_no_tokenizer, decode=_no_tokenizer)
    index = index_digest(sources)
    name = repr((configs, data.model_dump_json(), tokenizer.fingerprint, frozen_prefix, index))
    return Job(configs, data, ids_alone, frozen_prefix, index, hashlib.sha256(name.encode()).hexdigest())


def index_digest(sources: Sequence[IndexedSource]) -> str:
    """A hash of which sample has which number: equal in two processes that found the same shards, indexes and exclusions."""
    digest = hashlib.sha256()
    for source in sources:
        for number, (shard, index, tokens) in enumerate(zip(source.shards, source.indexes.rows, source.tokens.rows, strict=True)):
            excluded = source.kept[number].tobytes() if number in source.kept else b""
            digest.update(f"{shard} {index.file} {index.digest} {tokens.file} {tokens.digest} {len(excluded)}\n".encode() + excluded)
    return digest.hexdigest()


def _no_tokenizer(*_: object) -> Any:
    raise RuntimeError("a data worker has no tokenizer: the token cache is not where it was when the run began")


@dataclass(frozen=True)
class _Place:
    """An array in the memory of a task."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


def packed(built: Built, arena: Arena) -> Built:
    """The same with places of the arena in the place of arrays, to be sent."""

    def place(array: np.ndarray) -> Any:
        return _Place(arena.offset_of(array), array.shape, array.dtype.str)

    return _map_arrays(built, place)


def unpacked(built: Built, memory: np.ndarray) -> Built:
    """The same with arrays again: views of `memory`, where the arena lies in this process."""
    arena = Arena(memory)

    def array(place: Any) -> np.ndarray:
        return arena.at(place.offset, place.shape, np.dtype(place.dtype))

    return _map_arrays(built, array)


def copied(built: Built) -> Built:
    """The same in memory of its own."""
    return _map_arrays(built, np.copy)


def _map_arrays(built: Built, change: Callable[[Any], Any]) -> Built:
    arrays = built.arrays
    columns = {name: change(array) for name, array in arrays.columns.items()}
    payloads = {modality: {name: change(array) for name, array in payload.items()} for modality, payload in arrays.payloads.items()}
    return dataclasses.replace(built, arrays=dataclasses.replace(arrays, columns=columns, payloads=payloads))
