"""Tile shapes per architecture and kernel. Each row compiles without spills for its architecture; none is searched at run time.

"wgrad_add" holds a tile of the old gradient beside the sum, so it has room for half the columns.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """A tile of `rows` by `columns` of the result, `inner` elements of the sum a step."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


SMALL = Config(64, 64, 32, 4, 3)
"""Every kernel, every architecture: 16-bit problems too small for the tiles below."""

FLOAT32 = Config(64, 64, 16, 8, 2)
"""Every kernel, every architecture: float32 in full precision, which is for checks and not for speed."""

CONFIGS: dict[int, dict[str, Config]] = {
    0: {name: Config(16, 16, 16, 4, 1) for name in ("forward", "dgrad", "wgrad", "wgrad_add", "swiglu")},  # the interpreter
    80: {
        "forward": Config(128, 128, 64, 8, 3),
        "dgrad": Config(128, 128, 64, 8, 3),
        "wgrad": Config(128, 128, 64, 8, 3),
        "wgrad_add": Config(128, 128, 64, 8, 3),
        "swiglu": Config(128, 64, 64, 8, 3),
    },
    # 99 KiB of shared memory
    86: {
        "forward": Config(128, 128, 32, 8, 3),
        "dgrad": Config(128, 128, 32, 8, 3),
        "wgrad": Config(128, 128, 32, 8, 3),
        "wgrad_add": Config(128, 128, 32, 8, 3),
        "swiglu": Config(128, 64, 32, 8, 3),
    },
    90: {
        "forward": Config(128, 256, 64, 8, 3),
        "dgrad": Config(128, 256, 64, 8, 3),
        "wgrad": Config(128, 256, 64, 8, 3),
        "wgrad_add": Config(128, 128, 64, 8, 3),
        "swiglu": Config(128, 128, 32, 8, 3),
    },
    100: {
        "forward": Config(128, 256, 64, 8, 3),
        "dgrad": Config(128, 256, 64, 8, 3),
        "wgrad": Config(128, 256, 64, 8, 3),
        "wgrad_add": Config(128, 128, 64, 8, 3),
        "swiglu": Config(128, 128, 32, 8, 3),
    },
    120: {
        "forward": Config(128, 128, 32, 8, 3),
        "dgrad": Config(128, 128, 32, 8, 3),
        "wgrad": Config(128, 128, 32, 8, 3),
        "wgrad_add": Config(128, 128, 32, 8, 3),
        "swiglu": Config(128, 64, 32, 8, 3),
    },
}
