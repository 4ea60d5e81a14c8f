"""`python -m fusiontrain`, for checkouts without the console script and for torchrun's `-m`."""

from __future__ import annotations

import sys

from fusiontrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
