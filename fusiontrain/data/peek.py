"""What a step saw, decoded into a folder: for a loss that spikes, and for whoever trusts only their eyes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusiontrain.config.schema import Config, DataConfig
from fusiontrain.data.documents import build_document
from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.read import read_sample, source_kind
from fusiontrain.data.index.shard_index import member_reader
from fusiontrain.data.plan.plan import Plan, PlannedDocument, PlannedSequence
from fusiontrain.data.shards import OpenShards
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.types import Document, Segment


def peek(sequences: list[PlannedSequence], plan: Plan, config: Config, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Write every document of `sequences` as text files and PNGs (latents as .npy), and `sources.json` that says where each came from.

    Texts are decoded from the ids and pictures from the patches that the model was given. Returns counts. A bad sample has a reason and no files.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards = OpenShards()
    try:
        rows = [
            _document(planned, plan, config, tokenizer, shards, out, f"sequence-{sequence.number}/document-{number}") | {"sequence": sequence.number}
            for sequence in sequences
            for number, planned in enumerate(sequence.documents)
        ]
    finally:
        shards.close()
    (out / "sources.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return {"sequences": len(sequences), "documents": len(rows), "bad samples": sum("bad" in row for row in rows), "folder": str(out)}


def _document(planned: PlannedDocument, plan: Plan, config: Config, tokenizer: Tokenizer, shards: OpenShards, out: Path, name: str) -> dict[str, Any]:
    source = plan.sources[planned.source]
    shard, row = source.locate(planned.sample)
    ref = source.ref(planned.sample)
    about = {
        "source": planned.source, "shard": ref.shard, "sample": ref.index, "key": ref.key, "epoch": planned.epoch, "part": planned.part,
        "cut": planned.cut, "tokens": planned.num_tokens, "image_tokens": planned.image_tokens,
    }  # fmt: skip
    try:
        members = source.indexes[shard].members(row)
        read = member_reader(members, shards.file(source.shards[shard]))
        sample = read_sample(source_kind(source.config), members, read, config.data.image.representation)
        document = build_document(sample, read, planned.places, planned.cut, config.data, tokenizer, ref)
    except BadSample as error:
        return about | {"bad": str(error), "files": []}
    return about | {"files": _write(document, config.data, tokenizer, out, name)}


def _write(document: Document, data: DataConfig, tokenizer: Tokenizer, out: Path, name: str) -> list[str]:
    (out / name).mkdir(parents=True, exist_ok=True)
    files = []
    for number, segment in enumerate(document.segments):
        stem = f"{name}/{number:02d}"
        if segment.token_ids is not None:
            files.append(f"{stem}.txt")
            (out / files[-1]).write_text(_spelled(segment.token_ids.tolist(), tokenizer), encoding="utf-8")
        elif data.image.representation == "latents":
            files.append(f"{stem}.npy")
            np.save(out / files[-1], _maps(segment, data))
        else:
            files.append(f"{stem}.png")
            Image.fromarray(_maps(segment, data).transpose(1, 2, 0)).save(out / files[-1])
    return files


def _spelled(token_ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of the ids, with the codes of images and units of speech as numbers in brackets."""
    own = {token: code for code, token in enumerate(tokenizer.code_ids)}
    runs = itertools.groupby(token_ids, lambda token: token in own or token >= tokenizer.vocab_size)
    return "".join(
        f"[{' '.join(str(own.get(token, token - tokenizer.vocab_size)) for token in run)}]" if codes else tokenizer.decode(list(run)) for codes, run in runs
    )


def _maps(segment: Segment, data: DataConfig) -> np.ndarray:
    """The picture [C, H, W] of a segment's patches: the inverse of `patchify`."""
    assert segment.values is not None and segment.grid is not None
    (rows, columns), side = segment.grid, data.image.patch_size
    cut = segment.values.reshape(rows, columns, -1, side, side)
    return cut.transpose(2, 0, 3, 1, 4).reshape(-1, rows * side, columns * side)
