"""Files and folders that are whole or not there: written aside, flushed, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dic_repa.errors import UserError

ASIDE = ".writing-"  # how the names of unfinished ones begin


def check_file(path: Path) -> None:
    """A UserError where no file can come to be at `path`; an older one there will be replaced."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    check_parents(path)


def check_folder(path: Path) -> None:
    """A UserError where no folder can be made at `path`, nor one that is there be written into."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder")
    if not path.exists():
        check_parents(path)


def check_parents(path: Path) -> None:
    """A UserError where nothing can be made at `path`: below a file, or in a folder that may not be written to."""
    place = next(parent for parent in path.parents if parent.exists())
    if not place.is_dir():
        raise UserError(f"{path} cannot be written: {place} is a file")
    if not os.access(place, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission to write into {place}")


@contextlib.contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file or a folder, which takes the place of `path` once it is whole and on the disk. A
    fault leaves what was there before, a kill that and the name, which the next writer removes. A folder is replaced by
    a folder only.
    """
    aside = path.with_name(f"{ASIDE}{path.name}")
    _remove(aside)
    try:
        yield aside
        for entry in [*aside.rglob("*"), aside]:
            _flush(entry)
        if aside.is_dir():
            _remove(path)  # the system replaces files by files only
        elif path.is_dir():  # whose content nobody has asked to remove
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        os.replace(aside, path)
        _flush(path.parent)
    except OSError as error:
        if isinstance(error.filename, str):  # the user knows the name that it was to have
            error.filename = error.filename.replace(aside.name, path.name)
        raise
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
