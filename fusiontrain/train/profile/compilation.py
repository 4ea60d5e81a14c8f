"""What torch.compile did so far in this process."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Compilation:
    """frames: pieces of code that were compiled, each again for every recompilation. graph_breaks: by their reason."""

    frames: int = 0
    graph_breaks: dict[str, int] = field(default_factory=dict)

    def __sub__(self, before: Compilation) -> Compilation:
        """What was added since `before`."""
        added = Counter(self.graph_breaks) - Counter(before.graph_breaks)
        return Compilation(self.frames - before.frames, dict(added))


def compilation() -> Compilation:
    """The counts of torch._dynamo, which stay nothing where nobody imported it."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return Compilation()
    return Compilation(dynamo.counters["frames"]["ok"], dict(dynamo.counters["graph_break"]))
