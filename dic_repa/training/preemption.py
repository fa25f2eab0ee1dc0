"""SIGTERM and SIGUSR1, which a cluster sends before it takes a machine away: save, and leave with a code to requeue."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

REQUEUE_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM,)


class Preempted(Exception):
    """A signal has stopped the run; its state is saved, and it goes on with `resume`."""


@contextlib.contextmanager
def stop_request() -> Iterator[list[int]]:
    """While entered, SIGTERM and SIGUSR1 are added to the list and do nothing else, so that the step is finished.

    A second signal changes nothing: a launcher passes on what the whole process group has received already.
    """
    received: list[int] = []
    with _handling(lambda number, _frame: received.append(number)):
        yield received


@contextlib.contextmanager
def _handling(handler: Callable) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def preempted_by_signals() -> Iterator[None]:
    """While entered, SIGTERM and SIGUSR1 raise Preempted: for the time before the first step and after the last, when
    there is nothing to save. `stop_request` goes before, while it is entered.
    """

    def stop(_number, _frame) -> None:
        raise Preempted("told to stop, with nothing left to save")

    with _handling(stop):
        yield


def ignore_signals(_worker: int = 0) -> None:
    """In a loader's process: whoever signals the whole group, it is the parent that says when to stop, after a
    checkpoint and a grid that may take minutes. A SIGTERM of the parent's own is Python's at its exit, and is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where there are no schedulers to send them
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)
