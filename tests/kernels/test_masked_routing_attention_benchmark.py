"""The benchmark of attention runs from end to end at toy size, and all that it times computes the same."""

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


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("attention")
    for name in ("attention", "harness"):
        del sys.modules[name]


def test_it_writes_complete_rows(attention: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    attention.main(["--size", "toy", "--device", "cpu", "--rounds", "1", "--only", "mixed", "--out", str(path)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    both = {"dense mask", "dense, repeated", "sdpa", "chunked", "triton"}
    for which, names in (("forward", both | {"flex", "flex + mask"}), ("backward", both), ("both", both)):
        assert {row["implementation"] for row in rows if row["pass"] == which} == names
    rivals = {row["baseline"] for row in rows if row["pass"] == "forward" and row["implementation"] == "triton"}
    assert rivals == {"dense mask", "dense, repeated", "flex", "flex + mask"}
    assert {row["baseline"] for row in rows if row["implementation"] != "triton"} == {"dense mask"}
    assert all(row["date"] and row["device"] and float(row["milliseconds"]) > 0 and float(row["tflops"]) > 0 for row in rows)


@pytest.mark.parametrize("layout", ["causal", "mixed", "pairs"])
def test_what_is_timed_computes_the_same(attention: ModuleType, layout: str) -> None:
    batch = attention.Batch(layout, 80, torch.device("cpu"))
    assert batch.allowed.shape == (80, 80) and batch.allowed.any(1).all()
    assert (layout == "causal") == bool(batch.allowed.equal(torch.ones(80, 80).tril().bool()))
    options = attention.parse("", ["--size", "toy", "--device", "cpu"])
    heads = torch.randn(80, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outs = {name: attend(heads, heads, heads) for name, attend in attention.implementations(layout, batch, options, False).items() if name != "triton"}
    for name, out in outs.items():
        torch.testing.assert_close(out, outs["dense mask"], rtol=0, atol=1e-12, msg=name)
