"""Ends a process that hangs, and says at what.

A thread looks, since the main thread may hang where no signal reaches it:

    with watched("step", "step 18", seconds):
        ...

Several processes tell each other what they are at, so that the one that ends names those that it has waited for.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dic_repa.errors import joined_store, prints_errors

TIMEOUT_CODE = 124  # as `timeout` of coreutils
LOOK = 0.5  # seconds between two looks
TELL = 2.0  # seconds after which a process tells anew what it is at
SUSPENDED = 5.0  # seconds without a look, after which the process itself must have been stopped; they do not count
trace = False  # print where all threads are, as under --debug


@dataclass
class _Section:
    name: str
    what: str
    seconds: float | None
    begin: float = field(default_factory=time.monotonic)


_now = _Section("", "", None)
_threads: list[threading.Thread] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.clear)  # a child has none of them


@contextlib.contextmanager
def watched(name: str, what: str, seconds: float | None) -> Iterator[None]:
    """End this process with TIMEOUT_CODE if the block takes longer than `seconds`, which `timeouts.NAME` gives.

    Args:
        what: that this process waits for, as in 'process 0 has waited 60 s for ...'.
        seconds: None for any time, also inside another such block, whose time begins anew after it.
    """
    global _now
    before, _now = _now, _Section(name, what, seconds)
    if not _threads and seconds:
        for action in (_look, _tell):
            _threads.append(threading.Thread(target=action, name="watchdog", daemon=True))
            _threads[-1].start()
    try:
        yield
    finally:
        before.begin = time.monotonic()
        _now = before


def _look() -> None:
    last = time.monotonic()
    while True:
        time.sleep(LOOK)
        section, now = _now, time.monotonic()
        if now - last > SUSPENDED:
            section.begin += now - last
        last, waited = now, now - section.begin
        if section.seconds and waited > section.seconds and section is _now:
            _end(section, waited)


def _end(section: _Section, waited: float) -> None:
    line = f"process {_rank()} has waited {waited:.0f} s for {section.what}, longer than timeouts.{section.name}"
    line += _in_time(lambda: _others(section), 3 * TELL) or ""
    if _in_time(prints_errors, TELL) in (True, None):
        line = f"\nerror: {line}; what was saved is whole, and `dic-repa train --resume` goes on\n"
        os.write(2, line.encode())  # the main thread may hang while it holds sys.stderr
    else:
        time.sleep(1)  # a launcher stops all processes once one ends; the line must be printed before
    if trace:
        faulthandler.dump_traceback()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(TIMEOUT_CODE)


def _tell() -> None:
    for count in range(sys.maxsize):
        with contextlib.suppress(Exception):  # the store is gone with the process that had it
            if store := joined_store():
                store.set(f"dic_repa/at/{_rank()}", f"{count} {_now.what}")
        time.sleep(TELL)


def _others(section: _Section) -> str:
    """What the other processes are at that are at something else, or that do not tell any more."""
    store, processes = joined_store(), range(int(os.environ.get("WORLD_SIZE", "1")))
    if store is None:
        return ""

    def told() -> list[bytes]:
        keys = [f"dic_repa/at/{process}" for process in processes]
        return [store.get(key) if store.check([key]) else b"" for key in keys]

    before = told()
    time.sleep(2 * TELL)
    found = []
    for process, (then, now) in enumerate(zip(before, told())):
        what = now.decode().partition(" ")[2]
        if str(process) != _rank() and (then == now or what != section.what):
            found.append(f"process {process} {'does not answer' if then == now else f'waits for {what}'}")
    return "".join(f"; {each}" for each in found[:3])


def _in_time(action: Callable[[], Any], seconds: float) -> Any:
    """The result of `action`; None where it takes longer or fails, since the store may hang too."""
    results: list = []

    def act() -> None:
        with contextlib.suppress(Exception):
            results.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _rank() -> str:
    return os.environ.get("RANK", "0")
