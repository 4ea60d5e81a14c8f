"""What the order of the data depends on, by name: a resumed run compares these with those of its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from fusiontrain.config.schema import Config
from fusiontrain.data.index.shard_index import IndexedSource
from fusiontrain.data.modalities.decoders import decode_path
from fusiontrain.data.tokenizer import Tokenizer

VERSION = 5


def plan_fields(config: Config, sources: Sequence[IndexedSource], tokenizer: Tokenizer) -> dict[str, str]:
    """What the order of the data depends on, by name: two runs see the same data exactly where these are equal."""
    data = config.data
    return {
        "plan version": str(VERSION),
        "seed": str(config.seed),
        "train.global_batch_sequences": str(config.train.global_batch_sequences),
        "data.sequence_length": str(data.sequence_length),
        "data.modalities": ",".join(data.modalities),
        **{f"data.image.{name}": repr(value) for name, value in data.image.model_dump(exclude={"decoder"}).items()},
        "data.image.decoder": decode_path(data.image),
        "data.condition_dropout": repr(data.condition_dropout),
        "data.oversize": data.oversize,
        "data.mix_by": data.mix_by,
        "data.document_mask": str(data.document_mask),
        "data.pack_window_documents": str(data.pack_window_documents),
        **({"data.io_mode": "lanes", "data.lanes": str(data.lanes)} if data.io_mode == "lanes" else {}),
        "data.tokenizer": tokenizer.fingerprint,
        **{f"data.sources.{source.number}.{name}": value for source in sources for name, value in _source_fields(source).items()},
    }


def fingerprint(fields: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _source_fields(source: IndexedSource) -> dict[str, str]:
    """The mixing policy and the content of the index; the path may change, the samples may not."""
    digests = [files.rows.columns["digest"] for files in (source.indexes, source.tokens)]
    excluded = [(shard, rows.tolist()) for shard, rows in sorted(source.kept.items())]
    content = hashlib.sha256(repr((digests, excluded)).encode())
    config = source.config
    return {
        "weight": repr(config.weight),
        "weight_schedule": repr(config.weight_schedule),
        "max_epochs": str(config.max_epochs),
        "image_first_probability": repr(config.image_first_probability),
        "samples": content.hexdigest(),
    }
