"""The stages of the demo: each is one thing a user could have done by hand with the commands of this package."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fusiontrain.utils.errors import UserError

Progress = Callable[[str, int, int], None]
"""Called with (stage, step, steps) while a training runs."""

POLL_SECONDS = 0.5
ENVIRONMENT = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}
"""Of the trainings, where nothing else is set; launch/env.sh has the reasons."""

EDGE_STEPS = 20
"""Losses "at the start" and "at the end" are means over this many steps."""


def find_config(name: str) -> Path:
    """A file of `configs/`, in a checkout or where the installed package put it."""
    places = [Path(__file__).parents[2] / "configs", Path(sysconfig.get_path("data")) / "share" / "fusiontrain" / "configs"]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise UserError(f"configs/{name}: not found in {' or '.join(map(str, places))}; run the demo from a checkout")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a line that is still being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def mean_of(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Mean of the values of `key` that are numbers; None without one."""
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return sum(values) / len(values) if values else None


def train(
    config: Path,
    run: Path,
    overrides: Sequence[str],
    processes: int,
    progress: Progress,
    stop_after_step: int | None = None,
    resume: str = "auto",
) -> None:
    """`torchrun ... fusiontrain train`, in processes of its own; its output goes to `<run>/logs/console.log`.

    stop_after_step: send the SIGTERM that a scheduler would send once that step is done, and wait for the save. Raises UserError with the end
    of the console log if the training fails.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "fusiontrain"),
        *("train", str(config), "--resume", resume, f"run.dir={run}", *overrides),
    ]
    console = run / "logs" / "console.log"
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("a") as log, _process(command, log) as process:
        stopped = False
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            rows = read_metrics(run)
            step = rows[-1]["step"] if rows else 0
            progress(run.name, step, _total_steps(run))
            if stop_after_step is not None and step >= stop_after_step and not stopped:
                process.send_signal(signal.SIGTERM)
                stopped = True
    if process.returncode != 0 and not stopped:
        tail = "\n".join(console.read_text().splitlines()[-15:])
        raise UserError(f"the training of {run} failed with code {process.returncode}; the end of {console}:\n{tail}")


def _total_steps(run: Path) -> int:
    """`train.steps` of a run that has written its resolved config; 0 before."""
    path = run / "config.yaml"
    if not path.is_file():
        return 0
    from fusiontrain.config.load import load

    return load(path).train.steps


@contextlib.contextmanager
def _process(command: Sequence[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child that does not outlive this process, whatever ends it."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**ENVIRONMENT, **os.environ})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            process.kill()


def export_base(run: Path, folder: Path) -> None:
    """The newest checkpoint of a dense run as a Hugging Face Llama folder, tokenizer included."""
    from fusiontrain.models.llama_weights import export_llama
    from fusiontrain.train.inference import load_for_inference

    trained = load_for_inference(run)
    export_llama(trained.model, str(folder), trained.tokenizer.json)


def same_steps(original: Path, replay: Path) -> tuple[bool, int]:
    """Whether every step that both runs recorded has bitwise equal losses and gradient norm, and how many such steps there are."""
    keys = ("loss", "loss/text", "loss/image", "grad_norm", "lr", "tokens")
    rows = {row["step"]: [row[key] for key in keys] for row in read_metrics(original)}
    pairs = [(rows[row["step"]], [row[key] for key in keys]) for row in read_metrics(replay) if row["step"] in rows]
    return bool(pairs) and all(before == after for before, after in pairs), len(pairs)


def text_logits_identical(run: Path, llama: Path) -> tuple[bool, int]:
    """Whether the trained model gives validation texts bit for bit the logits of the Llama it came from; and on how many tokens."""
    import torch

    from fusiontrain.data.loader import Loader
    from fusiontrain.models.build import build_model
    from fusiontrain.train.inference import load_for_inference

    trained = load_for_inference(run)
    model, config = trained.model, trained.config
    data = config.data.model_copy(update={"modalities": ("text",)})
    dense_model = config.model.model_copy(update={"recipe": "dense", "base": str(llama)})
    dense = build_model(config.model_copy(update={"data": data, "model": dense_model}))
    loader = Loader(config.model_copy(update={"data": data}), trained.tokenizer, "validation", 0, 1)
    same, tokens = True, 0
    with contextlib.closing(loader), torch.no_grad():
        for batch in next(loader.iterate(0))[0]:
            same &= torch.equal(model.text_logits(batch), dense.text_logits(batch))
            tokens += batch.token_counts["text"]
    return same, tokens
