"""What a person sees of a run: on a terminal, rendered by a terminal emulator, and in a log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pyte
import pytest

from fusiontrain.cli.reporters import PlainReporter, describe_step

ROOT = Path(__file__).parents[2]
VALUES = {
    "step": 2, "loss": 1.5, "loss/text": 0.5, "loss/image": 0.25, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1234.5, "mfu": 0.4,
    "data_seconds": 0.02, "step_seconds": 0.5, "memory_gib": 1.25, "skipped": 3,
}  # fmt: skip

SHOW = f"""
import sys, time
from pathlib import Path
from fusiontrain.cli.reporters import make_reporter
values = {VALUES!r}
reporter = make_reporter(is_main=True)
reporter.indexing(1, 2)
reporter.indexing(2, 2)
reporter.started(0, 400, Path("runs/somewhere"))
for step in range(1, 121):
    values["step"] = step
    reporter.step(values, due=step % 10 == 0)
    if step == 100:
        reporter.event("step 100: saved runs/somewhere/checkpoints/step-00000100 in 0.1 s")
    if step == 110:
        print("a line that a library prints", file=sys.stderr)
        print("ready", file=sys.__stdout__, flush=True)
        sys.stdin.readline()
        reporter.event("after the resize")
reporter.step({{**values, "step": 121, "loss/image": None}}, due=False)
reporter.finished()
"""


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def read_all(terminal: int, into: bytearray) -> None:
    with contextlib.suppress(OSError):  # the other side is closed
        while chunk := os.read(terminal, 65536):
            into += chunk


def on_a_terminal(columns: int, later_columns: int) -> tuple[list[str], bytes]:
    """Run SHOW with stderr on a terminal that is resized in the middle; returns the lines that a terminal of the later width ends up with."""
    main, side = pty.openpty()
    resize(main, 24, columns)
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-c", SHOW], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=side, env=environment, text=True)
    os.close(side)
    written = bytearray()
    reader = threading.Thread(target=read_all, args=(main, written), daemon=True)  # a terminal that nobody reads fills up
    reader.start()
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    resize(main, 24, later_columns)
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait() == 0
    watchdog.cancel()
    reader.join(30)
    os.close(main)
    screen = pyte.Screen(max(columns, later_columns), 60)
    stream = pyte.ByteStream(screen)
    stream.feed(bytes(written))
    return [line.rstrip() for line in screen.display if line.strip()], bytes(written)


@pytest.mark.parametrize(("columns", "later"), [(100, 100), (90, 120), (120, 70)])
def test_a_terminal_ends_with_the_events_and_one_view(columns: int, later: int) -> None:
    lines, written = on_a_terminal(columns, later)
    assert b"\x1b[" in written, "it is a live view"
    assert lines[:4] == [
        "training runs/somewhere from step 0 to 400",
        "step 100: saved runs/somewhere/checkpoints/step-00000100 in 0.1 s",
        "a line that a library prints",
        "after the resize",
    ]
    name, bar, losses, pace, saved = lines[4:]
    assert name == "runs/somewhere"
    assert re.fullmatch(r"[━╸╺ ]+ 121/400 eta \d:\d\d", bar)
    assert losses == "loss 1.5000 text 0.5000 image 0.2500 norm 1.000 lr 1.00e-03", "a modality without a target keeps its last loss"
    assert pace == "1,234 tok/s mfu 40.0% wait 4% memory 1.2 GiB skipped 3"
    assert re.fullmatch(r"last checkpoint step 100, 0:\d\d ago", saved)


def test_a_narrow_terminal_cuts_lines_and_wraps_none() -> None:
    lines, _ = on_a_terminal(30, 30)
    assert len(lines[-5:]) == 5 and lines[-3].startswith("loss 1.5000 text") and lines[-3].endswith("…") and len(lines[-3]) == 30


def test_a_log_has_whole_lines_that_grep_well(capsys: pytest.CaptureFixture) -> None:
    reporter = PlainReporter()
    reporter.started(0, 400, Path("runs/x"))
    for step in range(1, 21):
        reporter.step({**VALUES, "step": step}, due=step % 10 == 0)
    reporter.event("step 20: saved x")
    reporter.finished()
    first, *steps, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("training runs/x from step 0 to 400", "step 20: saved x")
    found = [re.fullmatch(r"step (\d+)/400 loss ([\d.]+) text ([\d.]+) image ([\d.]+) norm .* eta 0:00", line) for line in steps]
    assert [match and match.groups() for match in found] == [(number, "1.5000", "0.5000", "0.2500") for number in ("10", "20")]


def test_a_step_without_any_target_of_a_kind_says_nothing_of_it() -> None:
    assert describe_step({**VALUES, "loss/image": float("nan")}) == "loss 1.5000 text 0.5000 norm 1.000 lr 1.00e-03"
