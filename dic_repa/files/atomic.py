"""All outputs are written here: aside, flushed, then renamed, so that a file or folder is whole or not there."""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dic_repa.errors import UserError
from dic_repa.files import outputs


@contextlib.contextmanager
def write_aside(path: str | Path, kind: str | None = None, token: str = "") -> Iterator[Path]:
    """Write a file or a folder beside `path`, which replaces `path` once it is whole and on the disk.

    If the block fails, the old one stays. After a kill, the next writer removes the unfinished one. Files in the old
    folder that are not ours stay. Permissions follow the umask, also if the writing library has set others.

    Args:
        path: of the output.
        kind: for a folder, which one of `outputs.KINDS` it is; None for a file.
        token: of this writer, where several may write the same file at the same time; the last one's stays.

    Yields:
        The name of the file to write, which does not exist, or an empty folder to fill.

    Raises:
        UserError: there is something at `path` that is not ours.
    """
    path = Path(path)
    check = (lambda: outputs.check_folder(path, kind)) if kind else (lambda: outputs.check_file(path))
    if os.path.lexists(path):  # otherwise the system's own message is the best
        check()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = outputs.aside_of(path, token)
    _remove(aside)
    try:
        mode = _new_file_mode(aside)
        outputs.list_output(path)  # before it is there, so that a kill leaves nothing that is not listed
        if kind:
            aside.mkdir()
        with outputs.naming(path):
            yield aside
        if kind:
            outputs.write_marker(aside, outputs.Marker(kind, set(_names(aside))))
        for entry in [*aside.rglob("*"), aside]:
            if entry.is_file() and stat.S_IMODE(entry.stat().st_mode) != mode:
                entry.chmod(mode)
            flush(entry)
        if os.path.lexists(path):  # writing may have taken hours
            check()
            _check_way(aside, path)
        if kind and path.is_dir():
            _move_into(aside, path)
        else:
            os.replace(aside, path)
        flush(path.parent)
    except OSError as error:
        if error.filename is None and error.errno:
            error.filename = str(path)
        if isinstance(error.filename, str):  # the user knows the final name
            error.filename = error.filename.replace(aside.name, path.name)
        raise
    finally:
        _remove(aside)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file by `write_aside`."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _move_into(aside: Path, path: Path) -> None:
    """Move the content of `aside` into our folder `path`, in place of what its marker lists."""
    outputs.remove_folder(path)
    if not path.is_dir():  # else there is something in it that is not ours
        os.replace(aside, path)
        return
    for name in [outputs.MARKER, *_names(aside)]:  # the marker first: after a kill the folder is still ours
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / name, path / name)


def _check_way(aside: Path, path: Path) -> None:
    """A UserError if a file that is not ours has a name that is about to be written into our folder `path`."""
    marker = outputs.read_marker(path) if path.is_dir() else None
    if marker is None:
        return
    for name in _names(aside):
        ways = [path / name, *((path / parent) for parent in list(PurePosixPath(name).parents)[:-1])]
        taken = [way for way in ways[1:] if way.is_symlink() or way.is_file()]
        taken += [ways[0]] if os.path.lexists(ways[0]) and name not in marker else []
        if taken:
            raise UserError(f"{taken[0]} is in the way, and not written by dic-repa; move it, or name another folder")


def _names(folder: Path) -> list[str]:
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return sorted(name for name in files if name != outputs.MARKER)


def _new_file_mode(probe: Path) -> int:
    """The permissions of a new file, found by making one: reading the umask would change it, for all threads."""
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
