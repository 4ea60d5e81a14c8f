"""A training that starts from a Chameleon folder of Hugging Face: its own tokens for codes, from the shards to what is sampled."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

import fusiontrain
from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.data.world.make import make_world
from fusiontrain.data.world.tokens import NUM_CODES
from fusiontrain.testing.chameleon import NUM_PLAIN, TOKEN_NAMES, code_names, write_tiny_chameleon
from fusiontrain.testing.recipes import PATCH, SIDE, recipe_config
from fusiontrain.testing.training import SHAPE_KEYS


def codes_in(folder: Path) -> set[int]:
    """Every code in the shards, as tarfile and numpy read them."""
    found: set[int] = set()
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".vq.npy"):
                    found |= set(np.load(io.BytesIO(archive.extractfile(member).read())).flatten().tolist())
    return found


def test_it_trains_its_own_tokens_for_codes_and_samples_them(tmp_path, capsys):
    make_world(tmp_path / "world", 30, seed=1, tokens=True)
    base = write_tiny_chameleon(tmp_path / "base", NUM_CODES)
    overrides = {**dict.fromkeys(f"model.{key}" for key in (*SHAPE_KEYS, "qk_norm")), "model.base": base, "data.tokenizer": TOKEN_NAMES}
    config = recipe_config(tmp_path, "Chameleon", "run", 2, overrides)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0

    trained = fusiontrain.load(config.run.dir)
    before = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    moved = (trained.model.text.embedding.weight.detach() != before).any(dim=1)
    learnt, own = set(moved.nonzero().flatten().tolist()), list(code_names(NUM_CODES).values())
    codes = {token for token in learnt if token >= NUM_PLAIN}
    occurring = codes_in(tmp_path / "world" / "train")
    assert len(codes) > 10 and codes <= {own[code] for code in occurring}, "no other code was taken for one that occurs"
    assert ord("e") in learnt and not learnt & set(range(128, 256)), "no token that the texts lack was taken for a code"

    capsys.readouterr()
    assert main(["sample", config.run.dir, "--prompt", "a red circle.", "--temperature", "1", "--out", str(tmp_path / "out"), "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert len(sample["codes"]) == (SIDE // PATCH) ** 2 and all(0 <= code < NUM_CODES for code in sample["codes"])
    assert trained.tokenizer.code_ids == tuple(own)
