"""Work that commands on several machines share: each takes what nobody has, by a file that says whose it is.

Only what NFS and its like have is needed: a file that is made if it is not there, and its time of change. The owner
touches its claim while it lives. Work that was wrongly taken from a slow owner is done twice, and one result thrown
away.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Container, Generator, Iterator
from pathlib import Path
from typing import TypeVar

from dic_repa.errors import UserError, first_few
from dic_repa.files.lock import holder, lock_beside
from dic_repa.files.outputs import ASIDE, LOCK, MARKER, aside_of, remove_leftovers
from dic_repa.files.reading import parse_json
from dic_repa.runtime.progress import say

T = TypeVar("T")
BEAT = 10.0  # seconds between two touches
DEAD = 180.0  # seconds without one, after which an owner is taken for dead: several times what NFS keeps old times
LOOK = 1.0  # seconds between the first looks at what others have; later ten times as long


class ClaimLost(Exception):
    """Another command has taken this one for dead, and does its work."""


class Claims:
    """What one process has claimed of the work in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.token = folder, secrets.token_hex(4)
        self.clock: float | None = None  # by how many seconds the file system's is ahead of this machine's

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process has the file `name` of the folder for itself in this block.

        Raises:
            UserError: a command that shares with nobody writes into the folder.
        """
        descriptor = self._take(lock_beside(self.folder / name))
        if descriptor is None:
            yield False
            return
        ended = threading.Event()
        beat = threading.Thread(target=_touch, args=(descriptor, ended), daemon=True)
        try:
            if owner := holder(self.folder / LOCK):
                raise UserError(f"{self.folder} is in use by {owner}; stop it and start it with --share, or wait")
            beat.start()
            yield True
        finally:
            ended.set()
            if beat.ident:
                beat.join()
            os.close(descriptor)
            with contextlib.suppress(ClaimLost):
                self.check(name)
                lock_beside(self.folder / name).unlink(missing_ok=True)

    def each(self, missing: Callable[[], dict[str, T]]) -> Generator[tuple[str, T], None, None]:
        """Files of the folder that are `missing`, with what that says of them: each that nobody else has, claimed until
        the next one is asked for; until none is missing."""
        looks = 0
        while todo := missing():
            got = False
            for name, value in todo.items():
                if (self.folder / name).is_file():
                    continue
                with self.claim(name) as mine:
                    # Only now is it sure that nobody has finished it a moment ago.
                    if mine and not (self.folder / name).is_file():
                        got = True
                        yield name, value
            if got:
                continue
            looks += 1
            if looks == 2 and (owners := sorted(set(find_claims(self.folder).values()))):
                say(f"waiting for the last shards of {self.folder}, which {first_few(owners, 5)} write")
            time.sleep(LOOK * min(looks, 10))

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Have the file `name` of the folder (made if it is missing), as soon as nobody else has it."""
        made, looks = not self.folder.exists(), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                with self.claim(name) as mine:
                    if mine:
                        yield
                        return
                looks += 1
                if looks == 3:
                    owner = _name(_read(lock_beside(self.folder / name)))
                    say(f"waiting for {owner}, which writes {self.folder / name}")
                time.sleep(LOOK * min(looks, 10))
        finally:
            if made:
                with contextlib.suppress(OSError):  # something has been written into it
                    self.folder.rmdir()

    def sweep(self, names: Container[str]) -> None:
        """Once the files `names` are whole: remove their claims, and all that was left unfinished."""
        for file in self.folder.glob(f"{ASIDE}*.lock"):
            if _name_of(file) in names:
                remove_claim(file)
        remove_leftovers(self.folder)

    def check(self, name: str) -> None:
        """A `ClaimLost` if the claim of `name` is no longer this process's."""
        if _read(lock_beside(self.folder / name)).get("token") != self.token:
            raise ClaimLost(name)

    def _take(self, file: Path) -> int | None:
        """The open file of a new claim; None if somebody who lives has it."""
        for _ in range(2):
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                try:
                    os.write(descriptor, json.dumps(self._owner()).encode())
                    os.fsync(descriptor)
                except OSError:  # a full disk
                    os.close(descriptor)
                    file.unlink(missing_ok=True)
                    raise
                return descriptor
            if self.clock is None:
                self.clock = _clock(self.folder)
            if not _is_dead(file, time.time() + (self.clock or 0.0)):
                break
            remove_claim(file)
        return None

    def _owner(self) -> dict:
        where = {"process": os.getpid(), "host": socket.gethostname(), "place": _place()}
        return {"token": self.token, **where, "since": round(time.time())}


def find_claims(folder: Path) -> dict[Path, str]:
    """The claims in a folder whose owners live, each as 'process 17 on host'.

    By this machine's clock, so that nothing is touched.
    """
    files = sorted(folder.glob(f"{ASIDE}*.lock"))
    return {file: _name(_read(file)) for file in files if not _is_dead(file, time.time())}


def clear_claims(folder: Path) -> None:
    """Remove the claims of dead owners in a folder, which this process has locked; a UserError if an owner lives."""
    now = time.time() + (_clock(folder) or 0.0)
    for file in sorted(folder.glob(f"{ASIDE}*.lock")):
        if not _is_dead(file, now):
            owner = _name(_read(file))
            raise UserError(f"{folder} is in use by {owner}, which shares the work: help it with --share, or stop it")
        remove_claim(file)


def remove_claim(file: Path) -> None:
    """Remove the claim of a dead owner, and what that has left unfinished."""
    token = _read(file).get("token", "")
    if len(token) == 8 and token.isalnum():
        aside_of(file.with_name(_name_of(file)), token).unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def _name_of(claim: Path) -> str:
    return claim.name.removeprefix(ASIDE).removesuffix(".lock")


def _touch(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):  # taken over by another machine, or a server that is away for a while
            os.utime(descriptor)


def _is_dead(file: Path, now: float) -> bool:
    """Whether the owner of a claim has not touched it for long, or was a process of this machine that is gone."""
    try:
        age = now - file.stat().st_mtime
    except OSError:  # released by now
        return False
    owner = _read(file)
    return age > DEAD or (owner.get("place") == _place() and _is_gone(owner.get("process")))


def _is_gone(process: object) -> bool:
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # of another user
        pass
    return False


def _clock(folder: Path) -> float | None:
    """By how many seconds the clock of the file system, which dates the claims, is ahead; None if it was not begun."""
    with contextlib.suppress(OSError):
        os.utime(folder / MARKER)
        return (folder / MARKER).stat().st_mtime - time.time()
    return None


def _place() -> str:
    """Where a process id means the same process: a boot of a machine, and in it a container."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _read(file: Path) -> dict:
    """What a claim says; nothing if it is gone, or not written yet."""
    with contextlib.suppress(OSError, ValueError), file.open("rb") as stream:
        content = parse_json(stream.read(1000).decode())
        if isinstance(content, dict) and isinstance(content.get("token", ""), str):
            return content
    return {}


def _name(owner: dict) -> str:
    known = {"process", "host"} <= owner.keys()
    return f"process {owner['process']} on {str(owner['host'])[:100]}" if known else "another command"
