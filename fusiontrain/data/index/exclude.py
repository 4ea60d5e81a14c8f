"""Samples that a person wants left out of every plan, by shard and key: `excluded.json` beside the indexes of a folder of shards.

Delete that file to have them back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusiontrain.data.index.array_file import write_whole
from fusiontrain.data.index.folder import index_folders
from fusiontrain.data.index.shard_index import ShardIndex
from fusiontrain.data.storage.shard import Shard, common_name, is_local
from fusiontrain.utils.errors import UserError

NAME = "excluded.json"


def read_exclusions(path: Path) -> dict[str, set[str]]:
    """Keys by shard of a file of JSON lines with "shard" and "key", such as a run's `bad_samples.jsonl`. Raises UserError."""
    found: dict[str, set[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list of samples to exclude cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = json.loads(line)
                shard, key = str(entry["shard"]), str(entry["key"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{path}: line {number} is not a JSON object with "shard" and "key"') from error
            found.setdefault(common_name(Path(shard)) if is_local(shard) else shard, set()).add(key)
    return found


def exclude(shards: Sequence[Shard], indexes: Sequence[ShardIndex], exclusions: dict[str, set[str]], index_dir: Path | None) -> int:
    """Add keys to what those shards have excluded; the number of samples that are excluded of them now. Raises UserError for other shards and for
    keys that none of their samples has."""
    unknown = exclusions.keys() - {common_name(shard) for shard in shards}
    if unknown:
        raise UserError(f"{min(unknown)}: samples of it are to be excluded, but it is none of those given; name it too (a relative path is meant from here)")
    for shard, index in zip(shards, indexes, strict=True):
        wanted = exclusions.get(common_name(shard), set())
        missing = wanted and wanted - {index.key(row) for row in range(len(index))} - {key for _, key, _ in index.bad}
        if missing:
            raise UserError(f"{shard}: no sample of it has the key {min(missing)!r}, which is to be excluded; keys are those of `fusiontrain data inspect`")
    total = 0
    for parent in {shard.parent for shard in shards}:
        before = excluded_keys(parent, index_dir)
        new = {shard.name: exclusions.get(common_name(shard), set()) for shard in shards if shard.parent == parent}
        after = {name: before.get(name, frozenset()) | new.get(name, set()) for name in {*before, *new}}
        if after != before and any(new.values()):
            _write(parent, index_dir, {name: sorted(keys) for name, keys in sorted(after.items()) if keys})
        total += sum(len(after[name]) for name in new)
    return total


def excluded_keys(shards: Path | str, index_dir: Path | None) -> dict[str, frozenset[str]]:
    """The keys that are excluded of a folder's shards, by name of the shard. Raises UserError when the list is damaged: silence would train
    on what was excluded."""
    for folder in index_folders(shards, index_dir):
        path = folder / NAME
        if path.is_file():
            try:
                return {name: frozenset(keys) for name, keys in json.loads(path.read_text(encoding="utf-8")).items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: not lists of keys by shard ({error}); mend or delete it") from error
    return {}


def kept_rows(index: ShardIndex, excluded: frozenset[str]) -> np.ndarray:
    """The rows [k] int32 of the index whose keys are not excluded."""
    return np.array([row for row in range(len(index)) if index.key(row) not in excluded], np.int32)


def _write(shards: Path | str, index_dir: Path | None, keys: dict[str, list[str]]) -> None:
    problems = []
    for folder in index_folders(shards, index_dir):
        try:
            write_whole(folder / NAME, [json.dumps(keys).encode()])
            return
        except OSError as error:
            problems.append(f"{folder} ({error})")
    raise UserError(f"{shards}: its excluded samples can be kept in none of {', '.join(problems)}")
