"""The benchmark scripts run from end to end at toy size, and the tables and files that they write can be read again."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
NAMES = ("harness", "block", "gemm", "rowwise", "cross_entropy", "tune", "first_run")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, as they find each other when run from their folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "only", "implementations"),
    [
        ("gemm", "^o ", {"dense", "boolean", "segments", "grouped_mm", "triton"}),
        ("gemm", "block", {"dense", "boolean", "segments", "triton"}),
        ("rowwise", "", {"copy", "reference", "triton"}),
        ("cross_entropy", "", {"products", "reference", "chunked", "triton"}),
    ],
)
def test_a_benchmark_writes_complete_rows(scripts: dict[str, ModuleType], tmp_path: Path, name: str, only: str, implementations: set[str]) -> None:
    path = tmp_path / "results.csv"
    for _ in range(2 if name == "cross_entropy" else 1):
        report = scripts[name].main(["--size", "toy", "--device", "cpu", "--rounds", "1", "--only", only, "--out", str(path)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.rows) * (2 if name == "cross_entropy" else 1) and list(rows[0]) == list(scripts["harness"].COLUMNS)
    assert {row["implementation"] for row in rows} == implementations
    assert all(row["date"] and row["device"] and row["torch"] == torch.__version__ and float(row["milliseconds"]) > 0 for row in rows)
    assert all(row["ratio"] == "1.000" for row in rows if row["implementation"] == row["baseline"])


def test_blocks_of_every_route_compute_the_same(scripts: dict[str, ModuleType]) -> None:
    """With the same weights for both modalities all of them are the dense block; masks that are the two halves keep the rows in place."""
    block = scripts["block"]
    shape, device = block.Shape(32, 64, 96, 2, 1), torch.device("cpu")
    halves = (torch.arange(32) < 16, torch.arange(32) >= 16)
    generator = torch.Generator().manual_seed(3)
    one = {name: torch.randn(*size, generator=generator) * size[1] ** -0.5 for name, size in shape.matrices().items()}
    one |= {name: torch.randn(64, generator=generator) for name in ("norm", "norm2")}
    x, outs = torch.randn(32, 64, generator=generator), {}
    for name, route in block.routes(shape, device, True, halves):
        weights = {key: [weight] * (1 if name == "dense" else 2) for key, weight in one.items()}
        q, k, v = route.attention_in(x, weights)
        outs[name] = torch.cat([q, k, v, route.rest(x, q, weights)], dim=1)
    assert set(outs) == {"dense", "segments", "triton", "boolean"}
    for out in outs.values():
        torch.testing.assert_close(out, outs["dense"], rtol=1e-4, atol=1e-5)


def test_ratios_are_taken_within_rounds(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is ten times slower in one round changes no ratio."""
    harness = scripts["harness"]
    monkeypatch.setattr(harness, "time_each", lambda *_: {"slow": [2.0, 20.0, 2.0], "fast": [1.0, 10.0, 1.0]})
    report = harness.Report("test", harness.parse("", ["--device", "cpu", "--out", "-"]))
    report.compare("case", "forward", torch.float32, {}, "slow", flops=3e12, size=4e9)
    slow, fast = report.rows
    assert (slow["ratio"], fast["ratio"], fast["milliseconds"], fast["tflops"], fast["gbytes_per_second"]) == ("1.000", "2.000", "1000", "3", "4")


def test_extra_memory_sees_what_is_there_for_a_moment(scripts: dict[str, ModuleType]) -> None:
    def for_a_moment() -> None:
        torch.ones(64 * 2**20 // 4)

    found = scripts["harness"].extra_memory(for_a_moment, torch.device("cpu"))
    if found is None:
        pytest.skip("the system does not say how much memory a process held at most")
    assert 60 < found < 80


def test_the_table_that_ships_is_what_the_search_writes(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    tune = scripts["tune"]
    shipped = Path(tune.table.__file__)
    assert tune.render(tune.table.TABLE) == shipped.read_text()
    changed = {**tune.table.TABLE, 90: {"forward": tune.Config(64, 64, 32, 4, 3)}, 103: {"wgrad": (1, 2, 3, 4, 5)}}
    (tmp_path / "table.py").write_text(tune.render(changed))
    assert tune.read(tmp_path / "table.py") == changed


def test_the_search_picks_a_candidate_and_leaves_other_rows_alone(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times that say that the second candidate is the best."""
    tune, path = scripts["tune"], tmp_path / "table.py"
    wide = tune.CANDIDATES["toy"][1]
    ran = []

    def times(functions, device, rounds):
        for name, function in functions.items():
            function()
            ran.append(name)
        return {name: [1.0 if name == "1" else 2.0] for name in functions}

    monkeypatch.setattr(tune, "time_each", times)
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    before = {kernel: tuple(config) for kernel, config in tune.CONFIGS[0].items()}
    tune.main(["--size", "toy", "--only", "wgrad$|dgrad", "--rounds", "1", "--table", str(path)])
    assert ran == ["0", "1"] * 2
    assert tune.read(path) == {**tune.table.TABLE, 0: {**before, "dgrad": tuple(wide), "wgrad": tuple(wide)}}
    assert {kernel: tuple(config) for kernel, config in tune.CONFIGS[0].items()} == before


def test_the_search_leaves_out_what_computes_something_else(scripts: dict[str, ModuleType]) -> None:
    tune, right = scripts["tune"], torch.ones(3)

    def broken() -> torch.Tensor:
        raise RuntimeError("out of resources")

    assert tune.usable(lambda: right * 1.001, right)
    assert not tune.usable(lambda: right * 1.1, right) and not tune.usable(lambda: right * float("nan"), right) and not tune.usable(broken, right)


def test_the_first_run_passes_every_kernel(scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    assert scripts["first_run"].main(["--size", "toy", "--device", "cpu", "--rounds", "2"]) == 0
    assert capsys.readouterr().out.count("ok, 2 runs alike") == 9


def test_the_first_run_sees_an_error_and_runs_that_differ(scripts: dict[str, ModuleType]) -> None:
    first_run, runs = scripts["first_run"], iter(range(9))

    def call(x: torch.Tensor, impl: str) -> tuple[torch.Tensor]:
        return (x.new_empty(0).sum() + x * (1 if impl == "reference" else 1.5 + next(runs)),)

    x = torch.ones(5, dtype=torch.bfloat16).requires_grad_()
    wrong, differs = first_run.faults(first_run.Case("wrong", call, [x]), 2)[::2]
    assert wrong.startswith("result 0 [5]: error 5.00e-01") and differs == "run 1 gives other bits than run 0"


def test_no_rounds_are_an_error(scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scripts["first_run"].main(["--size", "toy", "--device", "cpu", "--rounds", "0"])
    assert "--rounds 0: at least 1" in capsys.readouterr().err
