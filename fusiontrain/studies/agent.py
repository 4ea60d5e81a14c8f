"""torchrun that does not outlive the process that started it: `python -m fusiontrain.studies.agent PID [torchrun's arguments]`, PID being that process'.

A training that goes on when the command that wanted it is gone would hold its run folder, and the same command could not go on with it.
"""

from __future__ import annotations

import os
import sys

from fusiontrain.utils.orphans import die_with_parent


def main() -> None:
    """torchrun; its ranks end with it by themselves, see `cli/train.py`."""
    die_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it ended before we had said so
        sys.exit(1)
    from torch.distributed import run

    run.main(sys.argv[2:])


if __name__ == "__main__":
    main()
