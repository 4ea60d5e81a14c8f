"""What the benchmarks share: interleaved repeats, medians, ratios within one run, peak memory, and rows of a CSV file.

A round runs every implementation once, one after the other; what slows the machine down for a while then meets all of them. A ratio is the
median over rounds of the baseline's time divided by this one's in the same round: above 1 is faster than the baseline.

On a GPU times are between events, the L2 cache flushed before each. On a CPU they are CPU seconds of the process, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fusiontrain_kernels._launch import has_triton, interpreting

COLUMNS = {
    "date": "day of the run, UTC",
    "device": "name of the GPU or processor, and threads of the latter",
    "torch": "version",
    "triton": "version, empty if not installed",
    "benchmark": "the script",
    "case": "what is computed, with its sizes",
    "pass": "forward, backward (dgrad or wgrad alone), or both",
    "dtype": "of the tensors",
    "implementation": "the `impl` of the operator, or what it is compared with",
    "rounds": "of which `milliseconds` and `ratio` are medians",
    "milliseconds": "of the device (CPU: of processor time)",
    "baseline": "what `ratio` compares with",
    "ratio": "baseline / this one, within rounds; above 1 is faster",
    "tflops": "counted products / time; empty where memory is the limit",
    "gbytes_per_second": "bytes that must be read and written / time; empty where products are the limit",
    "extra_mib": "peak memory beyond inputs, output and gradients; empty where not measured",
}
RESULTS = Path(__file__).parent / "results"
Function = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """Of the command line. size: "toy" (seconds in Triton's interpreter), "cpu", "gpu" (Llama-3-8B)."""

    device: torch.device
    size: str
    rounds: int
    out: Path | None
    only: str


def parse(description: str | None, arguments: list[str] | None = None) -> Options:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help=f"cuda or cpu; here {found}")
    parser.add_argument("--size", choices=["toy", "cpu", "gpu"], help="default: as the device")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="regular expression for cases")
    parser.add_argument("--out", type=Path, help="CSV file to append to; default results/<device>.csv; '-' writes none")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: at least 1")
    device = torch.device(given.device)
    out = given.out or RESULTS / (re.sub(r"\W+", "-", device_name(device)).strip("-").lower() + ".csv")
    size = given.size or ("gpu" if device.type == "cuda" else "cpu")
    return Options(device, size, given.rounds, None if str(given.out) == "-" else out, given.only)


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    threads = torch.get_num_threads()
    return f"{(models or [platform.machine()])[0]}, {threads} thread{'s' * (threads > 1)}"


def can_run_triton(options: Options) -> bool:
    """On a GPU; in the interpreter at toy size only."""
    return has_triton() and (options.device.type == "cuda" or (interpreting() and options.size == "toy"))


def time_each(functions: Mapping[str, Function], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every function in every round, after two runs of each that do not count (none before a single round)."""
    for function in functions.values():
        for _ in range(min(rounds - 1, 2)):
            function()
    timer = _on_gpu if device.type == "cuda" else _on_cpu
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(timer(function))
    return samples


def _on_cpu(function: Function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _on_gpu(function: Function) -> float:
    torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()  # larger than any L2 cache
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def extra_memory(function: Function, device: torch.device) -> float | None:
    """MiB that the process or the GPU held at most while `function` ran, beyond what it held before. None where it cannot be known."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists() or not os.access(reset, os.W_OK):
        return None
    reset.write_text("5")  # the peak is now what is resident

    def read(field: str) -> float:
        found = re.search(rf"{field}:\s*(\d+) kB", status.read_text())
        return int(found[1]) / 1024 if found else float("nan")

    before = read("VmRSS")
    function()
    return read("VmHWM") - before


class Report:
    """Prints every row and, if the options say where, appends it to a CSV file."""

    def __init__(self, benchmark: str, options: Options) -> None:
        self.benchmark, self.options = benchmark, options
        self.rows: list[dict[str, object]] = []

    def compare(
        self,
        case: str,
        which: str,
        dtype: torch.dtype,
        functions: Mapping[str, Function],
        baselines: str | Sequence[str],
        flops: float | None = None,
        size: float | None = None,
        extra_mib: Mapping[str, float | None] | None = None,
    ) -> None:
        """Time `functions` side by side. baselines: all are compared with the first; "triton" also, in rows of their own, with each of the others that
        ran. flops and size: products and bytes of each."""
        if not re.search(self.options.only, case):
            return
        samples = time_each(functions, self.options.device, self.options.rounds)
        first, *rivals = [baselines] if isinstance(baselines, str) else baselines
        pairs = [(name, first) for name in samples] + [("triton", rival) for rival in rivals if "triton" in samples and rival in samples]
        for name, baseline in pairs:
            seconds = samples[name]
            median = statistics.median(seconds)
            ratio = statistics.median([a / b for a, b in zip(samples[baseline], seconds, strict=True) if b > 0] or [float("nan")])
            extra = (extra_mib or {}).get(name)
            self._add(
                {
                    "case": case,
                    "pass": which,
                    "dtype": str(dtype).removeprefix("torch."),
                    "implementation": name,
                    "milliseconds": f"{1000 * median:.4g}",
                    "baseline": baseline,
                    "ratio": f"{ratio:.3f}",
                    "tflops": f"{flops / median / 1e12:.4g}" if flops and median else "",
                    "gbytes_per_second": f"{size / median / 1e9:.4g}" if size and median else "",
                    "extra_mib": "" if extra is None else f"{extra:.1f}",
                }
            )

    def _add(self, row: dict[str, object]) -> None:
        versions = {"torch": torch.__version__, "triton": importlib.metadata.version("triton") if has_triton() else ""}
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        row = {"date": day, "device": device_name(self.options.device), **versions, "benchmark": self.benchmark, "rounds": self.options.rounds, **row}
        self.rows.append(row)
        rates = "  ".join(f"{row[name]} {name}" for name in ("tflops", "gbytes_per_second", "extra_mib") if row[name])
        name = f"{row['case']:48} {row['pass']:8} {row['dtype']:9} {row['implementation']:15}"
        print(f"{name} {row['milliseconds']:>9} ms  x{row['ratio']} of {row['baseline']}  {rates}", flush=True)
        if self.options.out is not None:
            append(self.options.out, row)


def append(path: Path, row: Mapping[str, object]) -> None:
    """One row, behind a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
