"""One writer at a time: a lock that the kernel frees when its owner dies, however it dies.

A folder that a command fills has its lock inside; a file or folder that is written aside and renamed, beside it.
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dic_repa.errors import UserError
from dic_repa.files.outputs import ASIDE, LOCK
from dic_repa.files.reading import parse_json
from dic_repa.runtime.progress import say, warn

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]  # mypy has no way to say that a module may be missing


LOOK = 0.1  # seconds, longer than `holder` holds a lock to look at it
_held: set[Path] = set()  # the lock files of this process


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if it is missing) for this process, also where it holds it already.

    Of several processes of one job, only the main one calls this.

    Raises:
        UserError: another process holds it, which the message names.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _hold(folder / LOCK, folder):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # something has been written into it
                folder.rmdir()


@contextlib.contextmanager
def locked_output(path: Path, wait: bool = False, tell: bool = True) -> Iterator[None]:
    """As `locked`, for a file or folder that appears when it is whole; with `wait`, until the other has written it,
    which a line may `tell`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _hold(lock_beside(path), path, wait, tell):
        yield


def lock_beside(path: Path) -> Path:
    """Where `locked_output` has its lock."""
    return path.with_name(f"{ASIDE}{path.name.removeprefix(ASIDE)}.lock")


def holder(lock: Path) -> str | None:
    """The process that holds a lock file, as 'process 17 on host'; None if there is none or no locks."""
    if lock.absolute() in _held:  # to open and close the file would release this process's lock
        return _name(json.dumps(_owner()))
    if fcntl is None or not lock.is_file():
        return None
    with contextlib.suppress(OSError), lock.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return _name(file.read(1000).decode(errors="replace"))
    return None


@contextlib.contextmanager
def _hold(lock: Path, what: Path, wait: bool = False, tell: bool = True) -> Iterator[None]:
    """Record locks, not flock: loader processes would inherit flock's and hold it after their parent was killed."""
    lock = lock.absolute()
    if fcntl is None or lock in _held:
        yield
        return
    descriptor = _acquire(lock, what, wait, tell)
    try:
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
                os.write(descriptor, json.dumps(_owner()).encode())
        _held.add(lock)
        yield
    finally:
        _held.discard(lock)
        if descriptor is not None:
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def _owner() -> dict:
    return {"process": os.getpid(), "host": socket.gethostname()}


def _acquire(lock: Path, what: Path, wait: bool, tell: bool) -> int | None:
    """The open, locked file; None on a file system that has no locks."""
    tries = 0
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            if error.errno != errno.ELOOP:  # a link in the lock's place is named itself
                error.filename = str(what)
            raise
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = _name(os.read(descriptor, 1000).decode(errors="replace"))
            os.close(descriptor)
            tries += 1
            if tries > 1 and not wait:
                raise UserError(f"{what} is in use by {owner}; wait for it, or stop it") from None
            if tries == 2 and tell:
                say(f"waiting for {owner}, which writes {what}")
            time.sleep(LOOK if tries < 20 else 1)
            continue
        except OSError as error:
            warn(f"{what} cannot be locked ({error.strerror}): let no other command write there")
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # its last owner removed it between our two calls


def _name(owner: str) -> str:
    try:
        content = parse_json(owner)
        return f"process {int(content['process'])} on {str(content['host'])[:100]}"
    except (ValueError, KeyError, TypeError):
        return "another command"
