"""A folder that is whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fusiontrain.utils.errors import UserError


@contextlib.contextmanager
def whole_folder(final: Path, may_replace: bool) -> Iterator[Path]:
    """Gives an empty folder beside `final`, which gets that name in one step when the block ends well, and goes where it does not.

    may_replace: a folder of that name that is not empty gives way, at the end. Raises UserError where there is one otherwise, and for a disk that
    is full or may not be written.
    """
    if final.exists() and (not final.is_dir() or (any(final.iterdir()) and not may_replace)):
        raise UserError(f"{final}: is there already and not empty: give another folder, or --overwrite to replace it")
    partial, replaced = final.with_name(final.name + ".tmp"), final.with_name(final.name + ".replaced.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{final}: cannot be written ({error}): make room there, or give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Puts the files of a folder, and its entries, on the disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
