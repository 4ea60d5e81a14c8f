"""Ways to damage a folder of files, one at a time, and to mend it again."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path


def damages(folder: Path, count: int, seed: int = 0) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """`count` times (what it is, a context in which it is so), spread over all files of `folder`: in each file a flipped byte at its first, last
    and random places, a cut at random lengths, and its deletion.
    """
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(count):
        path = files[number % len(files)]
        turn, size = number // len(files), path.stat().st_size
        if turn == 0:
            yield f"{path.name} deleted", _changed(path, None)
        elif turn % 4 == 1:
            length = draw.randrange(size)
            yield f"{path.name} cut to {length} bytes", _changed(path, path.read_bytes()[:length])
        else:
            place = {2: 0, 3: size - 1}.get(turn, draw.randrange(size))
            flip = 1 << draw.randrange(8) if turn % 2 else draw.randrange(1, 256)  # one bit, or any other byte
            content = bytearray(path.read_bytes())
            content[place] ^= flip
            yield f"{path.name} byte {place} xor {flip}", _changed(path, bytes(content))


@contextlib.contextmanager
def _changed(path: Path, content: bytes | None) -> Iterator[None]:
    """The file with other content, or gone if None. It is a new file meanwhile, so links to the old one keep theirs."""
    aside = path.parents[1] / f"{path.parent.name}-{path.name}.aside"
    os.rename(path, aside)
    try:
        if content is not None:
            path.write_bytes(content)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.rename(aside, path)
