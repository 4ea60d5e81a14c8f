"""What has to be said before torch or Triton is imported, in whichever test that happens first.

One thread per process: the machine's cores belong to the ranks that tests start. Without a GPU, Triton kernels run in its interpreter, which
Triton must know when a kernel is defined; its own library has some. Hypothesis times no example: the machine may be busy.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import settings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(name, "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
