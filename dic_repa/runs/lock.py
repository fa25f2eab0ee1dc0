"""One run folder, one run: a lock that the kernel frees when its owner dies, however it dies."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dic_repa.errors import UserError
from dic_repa.runtime.progress import warn

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]  # mypy has no way to say that a module may be missing


LOOK = 0.1  # seconds, longer than `holder` holds a lock to look at it
_held: set[Path] = set()  # by this process


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder (made if it is missing) for this process; a UserError names the process that holds it.

    A record lock, not flock: loader processes would inherit flock's and hold it after their parent was killed.
    """
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    descriptor = _acquire(path)
    try:
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
                os.write(descriptor, json.dumps(_owner()).encode())
        _held.add(folder.resolve())
        yield
    finally:
        _held.discard(folder.resolve())
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def holder(folder: Path) -> str | None:
    """The process that works in the run folder, as 'process 17 on host'; None if there is none or no locks."""
    if folder.resolve() in _held:  # to open and close the file would release this process's lock
        return _name(json.dumps(_owner()))
    if fcntl is None or not (folder / "lock").is_file():
        return None
    with contextlib.suppress(OSError), (folder / "lock").open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return _name(file.read(1000).decode(errors="replace"))
    return None


def _owner() -> dict:
    return {"process": os.getpid(), "host": socket.gethostname()}


def _acquire(path: Path) -> int | None:
    """The open, locked file; None on a file system that has no locks."""
    refused = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            if not refused:
                refused = True
                time.sleep(LOOK)
                continue
            raise UserError(f"{path.parent} is in use by {_name(owner)}; wait for it, or stop it") from None
        except OSError as error:
            warn(f"{path.parent} cannot be locked ({error.strerror}): begin no second run there")
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # its last owner removed it between our two calls


def _name(owner: str) -> str:
    try:
        content = json.loads(owner)
        return f"process {content['process']} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
