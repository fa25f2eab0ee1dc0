"""Files and folders that are whole or not there: written aside, flushed, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

ASIDE = ".writing-"  # how the names of unfinished ones begin


@contextlib.contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file or a folder, which takes the place of `path` once it is whole and on the disk. A
    fault leaves what was there before, a kill that and the name, which the next writer removes.
    """
    aside = path.with_name(f"{ASIDE}{path.name}")
    _remove(aside)
    try:
        yield aside
        for entry in [*aside.rglob("*"), aside]:
            _flush(entry)
        if path.is_dir() or aside.is_dir():
            _remove(path)  # the system replaces files by files only
        os.replace(aside, path)
        _flush(path.parent)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
