"""SIGTERM and SIGUSR1, which a cluster sends before it takes a machine away: save, and leave with a code to requeue."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

REQUEUE_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM,)


class Preempted(BaseException):  # a library in which the signal comes may wrap any Exception into one of its own
    """A signal has stopped the run; its state is saved, and it goes on with `resume`."""


@contextlib.contextmanager
def stop_request(save: bool = True) -> Iterator[list[int]]:
    """While entered, SIGTERM and SIGUSR1 are added to the list and do nothing else, so that the step is finished.

    A second signal changes nothing: a launcher passes on what the whole process group has received already.

    Args:
        save: False before the first step and after the last one, when there is nothing to save: then a signal raises
            Preempted, unless a `stop_request` inside this one is entered too.
    """
    received: list[int] = []

    def handle(number: int, _frame) -> None:
        if not save:
            raise Preempted("stopped by a signal, with nothing left to save")
        received.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def ignore_signals(_worker: int = 0) -> None:
    """In a loader's process: ignore signals to the whole group, since the parent still needs it to save a checkpoint.

    A SIGTERM that the parent itself sends, as Python does at its exit, is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, which clusters do not use
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)
