"""What the ranks of a run say of a mistake: one of them where all have found the same, each with its rank where they have not."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from fusiontrain.cli.main import main
from fusiontrain.cli.rank_errors import tell_in_run
from fusiontrain.config.load import to_yaml
from fusiontrain.parallel.mesh import Ranks, read_ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.shards import write_shards
from fusiontrain.train.status import Status, failure_of, write_status
from fusiontrain.utils.errors import UserError


def command(name: str, arguments: list[list[str]]) -> tuple[int, list[str]]:
    """`fusiontrain train` or another one on this rank, with its own arguments: the exit code, and the errors that it told."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main([name, *arguments[read_ranks().rank]])
    return code, [line for line in said.getvalue().splitlines() if line.startswith("fusiontrain: error: ")]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ranks")
    write_shards(folder / "shards", shards=1, samples=8)
    values = {"data.sources": [{"path": str(folder / "shards")}], "train.steps": 2, "train.global_batch_sequences": 2, "run.dir": str(folder / "run")}
    (folder / "run.yaml").write_text(to_yaml(tiny_config(values)))
    return str(folder / "run.yaml")


@pytest.mark.parametrize("mistake", [["train.stepz=3"], ["--resume", "nowhere"], ["run.dir={config}"]], ids=["before the start", "in the run", "no folder"])
def test_what_all_ranks_find_is_told_once(config_file: str, mistake: list[str]) -> None:
    arguments = [config_file, *(word.format(config=config_file) for word in mistake)]
    (first, told), (second, silent) = shared_pool().run(command, 2, "train", [arguments, arguments])
    assert first == second == 2 and len(told) == 1 and silent == []
    assert not told[0].startswith("fusiontrain: error: rank")


@pytest.mark.parametrize("name", ["train", "profile"])
def test_what_one_rank_finds_has_its_rank(config_file: str, name: str) -> None:
    (first, silent), (second, told) = shared_pool().run(command, 2, name, [[config_file], ["missing.yaml"]])
    assert first == second == 2 and silent == []
    assert [line.partition(";")[0] for line in told] == ["fusiontrain: error: rank 1: missing.yaml: no such file"]
    (_, of_main), (_, of_other) = shared_pool().run(command, 2, name, [["missing.yaml"], [config_file, "train.stepz=3"]])
    assert [line.partition(";")[0] for line in of_main] == ["fusiontrain: error: missing.yaml: no such file"]
    assert len(of_other) == 1 and of_other[0].startswith("fusiontrain: error: rank 1: ") and "train.stepz" in of_other[0]


@pytest.mark.parametrize(
    ("of_main", "told"),
    [(None, True), ("", True), ("a.tar: is damaged", False), ("b.tar: is damaged", True)],
    ids=["unheard of", "trains on", "the same", "another"],
)
def test_in_a_run_the_main_rank_speaks_for_those_who_end_as_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, of_main: str | None, told: bool
) -> None:
    monkeypatch.setattr("fusiontrain.cli.rank_errors.SAME_SECONDS", 0.2)
    if of_main is not None:
        failure = failure_of(UserError(of_main)) if of_main else ""
        write_status(tmp_path, Status(0, "host", 1, "1", 1, 7, "data", 0.0, failure=failure))
    tell_in_run(UserError("a.tar: is damaged"), Ranks(3, 4), tmp_path)
    assert capsys.readouterr().err == ("fusiontrain: error: rank 3: a.tar: is damaged\n" if told else "")
