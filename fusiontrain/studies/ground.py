"""What the trainings of the demo and of the studies start from: a demo world, its tokenizer, and a small Llama that was pretrained on its texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusiontrain.data.world.make import make_world
from fusiontrain.data.world.tokenizer import SPEECH_TOKENS, write_tokenizer
from fusiontrain.models.llama_weights import export_llama
from fusiontrain.studies.child import Progress, find_config, train
from fusiontrain.train.inference import load_for_inference


@dataclass(frozen=True)
class Ground:
    """A folder with `world/`, `tokenizer.json` and `llama/`, the last made from the training in `llama_run/`. codes: the world holds its pictures as codes
    too, and speech."""

    folder: Path
    seed: int
    codes: bool = False

    @property
    def world(self) -> Path:
        return self.folder / "world"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def llama(self) -> Path:
        return self.folder / "llama"

    def sources(self, *series: str) -> tuple[str, ...]:
        """Overrides: this world in place of a config's, one source per series of shards, and the seed."""
        sources = (f"data.sources.{i}.path={self.world / 'train' / name}-*.tar" for i, name in enumerate(series))
        return (*sources, f"data.validation_sources.0.path={self.world / 'validation'}", f"seed={self.seed}")

    def make_world(self, documents: int) -> None:
        """Write the world and train its tokenizer, whose file appears last and whole: where it is, so is the world."""
        make_world(self.world, documents, self.seed, tokens=self.codes)
        partial = self.tokenizer.with_suffix(".partial")
        write_tokenizer(self.world / "train", partial, SPEECH_TOKENS if self.codes else ())
        partial.replace(self.tokenizer)

    def pretrain(self, overrides: Sequence[str], processes: int, progress: Progress) -> None:
        """Train the text-only Llama of `configs/quickstart_llama.yaml` and export it as a Hugging Face folder."""
        run = self.folder / "llama_run"
        settings = (*self.sources("texts", "pictures"), f"data.tokenizer.path={self.tokenizer}", *overrides)
        train(find_config("quickstart_llama.yaml"), run, settings, processes, progress)
        trained = load_for_inference(run)
        export_llama(trained.model, str(self.llama), trained.tokenizer.json)
