"""What `data plan` says of samples that do not fit."""

from __future__ import annotations

import io

import numpy as np
import pytest

from fusiontrain.data.loader import Loader
from fusiontrain.data.plan.report import report
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import interleaved, mixed_samples, write_shard

LONG = interleaved(["x" * 300], [None])


def counts(path, **overrides):
    """The numbers of unusual samples of one epoch, by what became of them."""
    config = tiny_config({"data.sources": [{"path": str(path)}], "data.pack_window_documents": 8, "train.global_batch_sequences": 1, **overrides})
    loader = Loader(config, load_tokenizer(config), "train", 0, 1)
    told = report(loader.plan, config, 1, 1)
    return {label.removesuffix(" (in whole windows)").removeprefix("samples "): told[label] for label in told if label.endswith("windows)")}


@pytest.mark.parametrize(("oversize", "label"), [("truncate", "cut short"), ("split", "split"), ("drop", "dropped as too long")])
def test_samples_that_are_too_long_are_counted_by_what_becomes_of_them(tmp_path, oversize, label):
    path = write_shard(tmp_path / "x.tar", [LONG, *mixed_samples(6), LONG])
    found = counts(path, **{"data.oversize": oversize})
    assert found.pop(label) == 2
    assert set(found.values()) == {0}


def test_latents_that_patches_do_not_divide_are_counted(tmp_path):
    def latent(side):
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((3, side, side), np.float32))
        return {"txt": b"words", "latent.npy": buffer.getvalue()}

    path = write_shard(tmp_path / "x.tar", [latent(4), latent(8), latent(5), *[latent(12)] * 5])
    found = counts(path, **{"data.image.representation": "latents"})
    assert found == {"cut short": 0, "split": 0, "dropped as too long": 0, "dropped, patches do not divide them": 1}
