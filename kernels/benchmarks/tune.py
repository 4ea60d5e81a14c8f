"""Searches the tiles of modality_gemm on this GPU and writes its rows of the table that ships.

    python kernels/benchmarks/tune.py [--only wgrad] [--rounds 20] [--table FILE]

Every candidate runs at Llama-3-8B's feed-forward sizes, is compared with the tiles of today, and timed beside them; one that does not compile, does
not fit or computes something else is left out. Afterwards `make aot`: a row that spills for its architecture must not ship.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import time_each

from fusiontrain_kernels._launch import architecture
from fusiontrain_kernels.modality_gemm import table, triton_ops
from fusiontrain_kernels.modality_gemm.configs import CONFIGS, Config

Table = Mapping[int, Mapping[str, tuple[int, ...]]]
SIZES = {"toy": (40, 32, 48), "gpu": (8192, 4096, 14336)}
"""T, K, N."""
CANDIDATES = {
    "toy": [Config(16, 16, 16, 4, 1), Config(32, 16, 16, 4, 1)],
    "gpu": [
        Config(rows, columns, inner, warps, stages)
        for rows, columns, inner, warps, stages in itertools.product((64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (3, 4))
        if rows * columns <= 128 * 256 and rows * columns // (32 * warps) <= 128  # what the sum takes of a thread's 255 registers
    ],
}
HEADER = '''"""Tiles of modality_gemm by compute capability and kernel: rows, columns, inner, warps, stages.

Written by kernels/benchmarks/tune.py. `configs.py` says what the numbers mean.
"""

TABLE: dict[int, dict[str, tuple[int, int, int, int, int]]] = {
'''


def render(rows: Table) -> str:
    """The text of table.py."""
    lines = []
    for capability, kernels in sorted(rows.items()):
        lines.append(f"    {capability}: {{")
        lines += [f'        "{kernel}": {tuple(config)!r},' for kernel, config in kernels.items()]
        lines.append("    },")
    return HEADER + "\n".join(lines) + "\n}\n"


def read(path: Path) -> Table:
    """The table that a file holds."""
    names: dict[str, Table] = {}
    exec(compile(path.read_text(), path, "exec"), names)
    return names["TABLE"]


@contextmanager
def using(capability: int, kernel: str, config: Config) -> Iterator[None]:
    """Launches take `config` for `kernel`."""
    row = CONFIGS[max(known for known in CONFIGS if known <= capability)]
    before = row[kernel]
    row[kernel] = config
    try:
        yield
    finally:
        row[kernel] = before


def calls(size: str, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """One launch of every kernel, by name, and its first result."""
    num_rows, inner, width = SIZES[size]
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(shape[-1] ** -0.5).to(torch.bfloat16 if device.type == "cuda" else torch.float32)

    x, grad, weights, ups = normal(num_rows, inner), normal(num_rows, width), [normal(width, inner) for _ in range(2)], [normal(width, inner) for _ in range(2)]
    offsets = torch.tensor([0, num_rows // 2 + 3, num_rows], dtype=torch.int32, device=device)
    live = [True, True]

    def add() -> torch.Tensor:
        into = [torch.zeros(width, inner, device=device) for _ in range(2)]
        triton_ops.accumulate(x, grad, into, offsets, live)
        return into[0]

    return {
        "forward": lambda: triton_ops.gemm(x, weights, [], offsets, []),
        "dgrad": lambda: triton_ops.dgrad([grad], weights, offsets),
        "wgrad": lambda: triton_ops.wgrad(x, grad, offsets, live, x.dtype, False)[0],
        "wgrad_add": add,
        "swiglu": lambda: triton_ops.gemm_swiglu(x, weights, ups, offsets)[0],
    }


def usable(call: Callable[[], torch.Tensor], expected: torch.Tensor) -> bool:
    """Whether it compiles, fits, and computes the same but for rounding."""
    try:
        actual = call()
    except Exception as error:  # Triton's own classes differ from version to version
        print(f"  left out: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return False
    difference = float((actual.float() - expected.float()).abs().max()) / max(float(expected.float().abs().max()), 1e-30)
    return difference < 2e-2


def search(kernel: str, call: Callable[[], torch.Tensor], capability: int, candidates: list[Config], device: torch.device, rounds: int) -> Config:
    """The fastest of the candidates and of today's tiles, by the median over rounds in which each runs once."""
    today = CONFIGS[max(known for known in CONFIGS if known <= capability)][kernel]
    expected = call()

    def with_config(config: Config) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with using(capability, kernel, config):
                return call()

        return run

    functions = {config: with_config(config) for config in dict.fromkeys([today, *candidates])}
    functions = {config: function for config, function in functions.items() if config == today or usable(function, expected)}
    samples = time_each({str(i): function for i, function in enumerate(functions.values())}, device, rounds)
    medians = {config: statistics.median(seconds) for config, seconds in zip(functions, samples.values(), strict=True)}
    best = min(medians, key=medians.__getitem__)
    print(f"{kernel}: {tuple(best)} {1000 * medians[best]:.3f} ms; today {tuple(today)} {1000 * medians[today]:.3f} ms; {len(medians)} candidates", flush=True)
    return best


def main(arguments: list[str] | None = None) -> Table:
    """Searches, writes, and returns the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="regular expression for kernels")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", choices=list(SIZES), default="gpu", help="toy: for Triton's interpreter")
    parser.add_argument("--table", type=Path, default=Path(table.__file__), help="file to write; default the one that ships")
    options = parser.parse_args(arguments)
    if options.size == "gpu" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --size toy tries the search in Triton's interpreter")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capability = architecture(torch.empty(0, device=device))
    chosen = {name: call for name, call in calls(options.size, device).items() if re.search(options.only, name)}
    found = {name: search(name, call, capability, CANDIDATES[options.size], device, options.rounds) for name, call in chosen.items()}
    today = {name: tuple(config) for name, config in CONFIGS[max(known for known in CONFIGS if known <= capability)].items()}
    rows = {**table.TABLE, capability: {**today, **{name: tuple(config) for name, config in found.items()}}}
    options.table.write_text(render(rows))
    return rows


if __name__ == "__main__":
    main()
    sys.exit(0)
