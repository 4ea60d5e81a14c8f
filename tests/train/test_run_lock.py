"""Two trainings in one run folder would write over each other's metrics and checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusiontrain.testing.ranks import shared_pool
from fusiontrain.train.run_lock import only_training_in
from fusiontrain.utils.errors import UserError

HOLD = "import sys, time; from pathlib import Path; from fusiontrain.train.run_lock import only_training_in\n" + (
    "with only_training_in(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
)


def enter(folder: str) -> str:
    """What a rank of a second training is told."""
    try:
        with only_training_in(Path(folder)):
            return "entered"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_training_is_refused_until_the_first_is_gone_however_it_ends(tmp_path: Path, end: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        told = [enter(str(tmp_path / "run")), *shared_pool().run(enter, 2, str(tmp_path / "run"))]
        assert told == [f"{tmp_path / 'run'}: another training is writing there; wait for its end, stop it, or set another run.dir"] * 3
        os.kill(first.pid, end)
        first.wait()
    assert shared_pool().run(enter, 2, str(tmp_path / "run")) == ["entered"] * 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/run: cannot be written"), only_training_in(tmp_path / "file" / "run"):
        pass
