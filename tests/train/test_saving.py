"""Saving in the background: what is saved is the moment of the save, and what goes wrong there ends the run on all ranks alike."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontrain.parallel.mesh import Ranks, process_group, read_ranks
from fusiontrain.parallel.reduce import on_main
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.train.checkpoint import list_checkpoints, load_checkpoint, save, verify_checkpoint
from fusiontrain.train.checkpoint.folders import publish
from fusiontrain.train.saving import Saver, all_finite
from fusiontrain.train.state import TrainState, optimizer_tensors
from fusiontrain.utils.errors import UserError

IMPATIENT = {"parallel.timeout_seconds": 4}


class Run:
    """A few parameters, an optimizer whose every step changes all of them, and their saver."""

    def __init__(
        self, folder: Path, asynchronous: bool = True, elements: int = 1000, ranks: Ranks | None = None, overrides: dict[str, Any] | None = None
    ) -> None:
        self.ranks = ranks or Ranks()
        names = [f"{name}.of-{self.ranks.rank}" for name in ("first", "second")]
        self.parameters = {name: torch.nn.Parameter(torch.zeros(elements)) for name in names}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1)
        for parameter in self.parameters.values():
            parameter.grad = torch.ones(elements)
        self.tensors = {"model": {k: v.detach() for k, v in self.parameters.items()}, "optimizer": optimizer_tensors(self.optimizer, self.parameters)}
        self.events: list[str] = []
        config = tiny_config({"run.dir": str(folder), "checkpoint.asynchronous": asynchronous, "checkpoint.keep_last": 2, **(overrides or {})})
        self.saver = Saver(config, self.ranks, self.tensors, {}, self.optimizer, self.events.append)

    def held(self) -> dict[str, torch.Tensor]:
        return {f"{group}/{name}": tensor.clone() for group, part in self.tensors.items() for name, tensor in part.items()}


def saved(checkpoint: Path, like: Run) -> dict[str, torch.Tensor]:
    tensors = {group: {name: torch.full_like(tensor, -1) for name, tensor in part.items()} for group, part in like.tensors.items()}
    load_checkpoint(checkpoint, tensors, like.ranks)
    return {f"{group}/{name}": tensor for group, part in tensors.items() for name, tensor in part.items()}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_moment_of_the_save_is_saved_while_training_goes_on(tmp_path: Path, asynchronous: bool) -> None:
    """The next updates begin as soon as `save` returns, long before a thread can have written 25 MB."""
    run = Run(tmp_path, asynchronous, elements=1_000_000)
    moments = []
    for step in (1, 2, 3):
        run.optimizer.step()
        moments.append(run.held())
        run.saver.save(TrainState(step=step), {"loss": 1.0})
    run.optimizer.step()
    run.saver.wait()
    run.saver.close()
    checkpoints = list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000002", "step-00000003"], "each save waits for the one before"
    for path, moment in zip(checkpoints, moments[1:], strict=True):
        assert verify_checkpoint(path) == []
        found = saved(path, run)
        assert found.keys() == moment.keys() and all(torch.equal(found[name], moment[name]) for name in moment)
    assert [event.split(" saved ")[0] for event in run.events] == ["step 1:", "step 2:", "step 3:"]
    assert run.saver.look()[1] > 0 and run.saver.look() == (False, 0.0)


def test_closing_lets_a_save_end(tmp_path: Path) -> None:
    run = Run(tmp_path, elements=300_000)
    run.saver.save(TrainState(step=1), {})
    run.saver.close()
    assert [verify_checkpoint(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [[]]


def fail_on_the_last_rank(folder: str) -> tuple[str, str, list[str]]:
    """What a rank is told when the disk has no room for the second save of the last rank; then there is room again."""
    ranks = read_ranks()
    with process_group(ranks, tiny_config().parallel):
        run = Run(Path(folder), ranks=ranks)
        run.saver.save(TrainState(step=1), {})
        run.saver.wait()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if ranks.rank == ranks.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        run.saver.save(TrainState(step=2), {})
        run.optimizer.step()  # is not held back for ever
        with pytest.raises(UserError) as caught:
            run.saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        left = on_main(lambda: sorted(path.name for path in Path(folder, "checkpoints").iterdir()))
        run.saver.save(TrainState(step=3), {})
        run.saver.wait()
        run.saver.close()
        return str(caught.value), run.events[-1], left


def test_a_full_disk_of_one_rank_ends_all_with_one_sentence(tmp_path: Path) -> None:
    for said, event, left in shared_pool().run(fail_on_the_last_rank, 2, str(tmp_path)):
        assert "step-00000002: cannot be saved (rank 1: " in said and "\n" not in said
        assert left == ["step-00000001"], "the old one stands, and the new one leaves its room"
        assert event.startswith("step 3: saved")
    assert [verify_checkpoint(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [[], []]


def test_a_folder_that_cannot_be_made_ends_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    for said in shared_pool().run(save_once, 2, str(tmp_path)):
        assert "step-00000001: cannot be saved" in said and "\n" not in said


def save_once(folder: str) -> str:
    ranks = read_ranks()
    with process_group(ranks, tiny_config().parallel):
        run = Run(Path(folder), ranks=ranks)
        run.saver.save(TrainState(step=1), {})
        with pytest.raises(UserError) as caught:
            run.saver.wait()
        run.saver.close()
        return str(caught.value)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_slow_storage_has_the_time_of_a_save_and_not_that_of_a_collective(tmp_path: Path, asynchronous: bool) -> None:
    for event in shared_pool().run(save_to_slow_storage, 2, str(tmp_path), asynchronous):
        assert event.startswith("step 1: saved")


def test_a_save_that_takes_too_long_is_a_sentence(tmp_path: Path) -> None:
    said = shared_pool().run(save_to_slow_storage, 2, str(tmp_path), True, 4)
    assert all("step-00000001: cannot be saved" in sentence and "\n" not in sentence for sentence in said)
    assert any("checkpoint.timeout_seconds" in sentence for sentence in said)


def save_to_slow_storage(folder: str, asynchronous: bool, patience: int = 120) -> str:
    ranks = read_ranks()
    with process_group(ranks, tiny_config().parallel), pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "publish", lambda *paths: (time.sleep(8), publish(*paths)))
        run = Run(Path(folder), asynchronous, ranks=ranks, overrides={**IMPATIENT, "checkpoint.timeout_seconds": patience})
        try:
            run.saver.save(TrainState(step=1), {})
            run.saver.wait()
        except UserError as error:
            return str(error)
        finally:
            run.saver.close()
        return run.events[0]


def test_a_best_that_is_never_known_is_said_once(tmp_path: Path) -> None:
    run = Run(tmp_path, asynchronous=False, overrides={"checkpoint.keep_best": "validation/image", "checkpoint.keep_last": 1})
    for step, values in enumerate(({"validation/image": 0.5}, {"loss": 1.0}, {"validation/image": float("nan")}), 1):
        run.saver.save(TrainState(step=step), values)
    run.saver.close()
    said = [event for event in run.events if "saved" not in event]
    assert len(said) == 1 and said[0].startswith("step 2: has no value of checkpoint.keep_best=validation/image")
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(value: float) -> None:
    tensors = {"a": torch.ones(3, 4), "none": torch.ones(0), "whole": torch.tensor([1])}
    assert all_finite(tensors)
    tensors["a"][1, 2] = value
    assert not all_finite(tensors)
