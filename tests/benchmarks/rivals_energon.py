"""The same work with Megatron-Energon, as its documentation shows it: "Crude Datasets" (a cooker, a SampleDecoder), "Packing"
(select_samples_to_pack and pack_selected_samples over a buffer) and the savable loader."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.energon as energon
from rivals import BUFFER, LENGTH, SHUFFLE, Encoder, finished

from fusiontrain.data.jsonl import shard_samples
from fusiontrain.data.plan.packing import best_fit_decreasing


@dataclass
class Document(energon.Sample):
    """A document, and then a sequence of several."""

    fields: dict[str, Any]


class Packing(energon.DefaultTaskEncoder):
    """Tokenises each document and packs a buffer of them."""

    def __init__(self, tokenizer: Path, decode: bool) -> None:
        super().__init__()
        self.encoder = Encoder(tokenizer)
        self.decoder = energon.SampleDecoder(image_decode="rgb8") if decode else None
        self.cookers = [energon.Cooker(self.cook)]

    @energon.stateless
    def cook(self, sample: dict[str, Any]) -> Document:
        return Document(**energon.basic_sample_keys(sample), fields=self.encoder.encode(sample))

    def select_samples_to_pack(self, samples: list[Document]) -> list[list[Document]]:
        groups = best_fit_decreasing([len(sample.fields["ids"]) for sample in samples], LENGTH)
        return [[samples[i] for i in group] for group in groups]

    @energon.stateless
    def pack_selected_samples(self, samples: list[Document]) -> Document:
        return Document.derive_from(samples[0], fields=self.encoder.pack([sample.fields for sample in samples]))


def prepare_energon(folder: Path, workers: int = 1) -> None:
    """Index the shards as its command line does."""
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(folder), "--non-interactive", "--no-progress", "--force-overwrite"]
    options = ["--split-ratio", "1,0,0", "--num-workers", str(workers), "--sample-type", "CrudeWebdataset"]
    subprocess.run([*command, *options], check=True, capture_output=True)


def energon_sequences(folder: Path, tokenizer: Path, workers: int, epochs: int, decode: bool) -> Iterator[dict[str, Any]]:
    """Packed sequences of about that many passes over the shards."""
    dataset = energon.get_train_dataset(
        str(folder), worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers), batch_size=None,
        shuffle_buffer_size=SHUFFLE, max_samples_per_sequence=SHUFFLE, packing_buffer_size=BUFFER, task_encoder=Packing(tokenizer, decode),
    )  # fmt: skip
    left = epochs * sum(1 for shard in folder.glob("*.tar") for _ in shard_samples(shard))
    for sample in energon.get_savable_loader(dataset):
        yield finished(sample.fields)
        left -= sample.fields["documents"]
        if left <= 0:
            return
