"""What a debug config needs and makes by itself the first time: a small demo world, a tokenizer, and a small Llama of random weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from fusiontrain.cli.common import note
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.config.schema import Config, DemoConfig
    from fusiontrain.parallel.mesh import Ranks

WAIT_SECONDS = 300
READY = "ready"
"""Written last: the folder is whole."""


def prepare(config: Config, ranks: Ranks) -> None:
    """Make what `config.demo` asks for unless it is there; other ranks wait for the main one. Raises UserError when that takes too long."""
    if config.demo is None:
        return
    folder = Path(config.demo.dir)
    if ranks.is_main and not (folder / READY).is_file():
        _make(folder, config.demo)
    deadline = time.monotonic() + WAIT_SECONDS
    while not (folder / READY).is_file():
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: the main rank did not finish the demo world within {WAIT_SECONDS} seconds; is the folder shared?")
        time.sleep(0.2)


def _make(folder: Path, demo: DemoConfig) -> None:
    from fusiontrain.config.schema import Config
    from fusiontrain.data.world.make import make_world
    from fusiontrain.data.world.tokenizer import SPEECH_TOKENS, VOCAB_SIZE, write_tokenizer
    from fusiontrain.models.build import build_model
    from fusiontrain.models.llama_weights import export_llama

    note(f"making a demo world of {demo.documents} documents in {folder}")
    make_world(folder / "world", demo.documents, demo.seed, tokens=demo.tokens)
    tokenizer = folder / "tokenizer.json"
    write_tokenizer(folder / "world" / "train", tokenizer, SPEECH_TOKENS if demo.tokens else ())
    shape = {"vocab_size": VOCAB_SIZE, "dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 128}
    config = Config.model_validate(
        {
            "model": {"recipe": "dense", **shape},
            "data": {"sources": [{"path": str(folder)}], "modalities": ["text"]},
            "train": {"steps": 1, "global_batch_sequences": 1},
        }
    )
    export_llama(build_model(config), str(folder / "llama"), tokenizer.read_text())
    (folder / READY).write_text("")
