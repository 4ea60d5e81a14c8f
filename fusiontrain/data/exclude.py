"""Samples that a person wants left out of every plan, by shard and key: `<shard>.excluded.json` beside the shard's index.

Delete that file to have them back.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusiontrain.data.index import ShardIndex
from fusiontrain.data.index_folder import index_folders
from fusiontrain.data.storage.shard import Shard, common_name, is_local
from fusiontrain.utils.errors import UserError


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


def exclude(shards: Sequence[Shard], exclusions: dict[str, set[str]]) -> int:
    """Add keys to what those shards have excluded; the number of samples that are excluded of them now. Raises UserError for other shards."""
    unknown = exclusions.keys() - {common_name(shard) for shard in shards}
    if unknown:
        raise UserError(f"{min(unknown)}: samples of it are to be excluded, but it is not among the shards given; name it too")
    for shard in shards:
        new = exclusions.get(common_name(shard), set())
        if new - excluded_keys(shard):
            _write(shard, sorted(new | excluded_keys(shard)))
    return sum(len(excluded_keys(shard)) for shard in shards)


def excluded_keys(shard: Shard) -> frozenset[str]:
    """Raises UserError when the list is damaged: silence would train on what was excluded."""
    for folder in index_folders(shard):
        path = folder / _name(shard)
        if path.is_file():
            try:
                return frozenset(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{path}: not a list of keys ({error}); mend or delete it") from error
    return frozenset()


def kept_rows(shard: Shard, index: ShardIndex) -> np.ndarray:
    """The rows [k] int32 of the index that are not excluded."""
    rows = np.arange(len(index), dtype=np.int32)
    excluded = excluded_keys(shard)
    return rows[[index.key(row) not in excluded for row in rows.tolist()]] if excluded else rows


def _name(shard: Shard) -> str:
    return f"{shard.stem}.excluded.json"


def _write(shard: Shard, keys: list[str]) -> None:
    problems = []
    for folder in index_folders(shard):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=folder, suffix=".tmp")
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(keys, file)
            os.chmod(partial, 0o644)
            os.replace(partial, folder / _name(shard))
            return
        except OSError as error:
            problems.append(f"{folder} ({error})")
    raise UserError(f"{shard}: its excluded samples can be kept in none of {', '.join(problems)}")
