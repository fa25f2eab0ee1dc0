"""How many threads torch uses on a CPU; a `map` in threads.

Torch's own choice is one a core, even if other work keeps cores busy; then in each operation all threads wait for the
one that has no core. So here busy cores are left out.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dic_repa.runtime.progress import say

A = TypeVar("A")
B = TypeVar("B")


class CoreWatch:
    """How many cores other processes have kept busy since it was made."""

    def __init__(self):
        self.begin = self._now()

    def others(self) -> float:
        """Their number, of all cores of the machine; the load of the last minute on a system that gives no more."""
        seconds, busy, own = (now - then for now, then in zip(self._now(), self.begin))
        if busy <= 0 or seconds < 0.2:
            return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return max(0.0, (busy - own) / seconds)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of the clock, of all processes together on their cores, and of this one."""
        try:
            line = Path("/proc/stat").read_text().splitlines()[0].split()
            user, nice, system, _idle, _waiting, *stolen = map(int, line[1:9])
            busy = (user + nice + system + sum(stolen)) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):  # not a Linux
            busy = 0.0
        return time.monotonic(), busy, time.process_time()


watch = CoreWatch()
_reason = ""


def choose_threads(tell: bool = True) -> None:
    """Use only the cores that others leave free, unless there is a GPU or the user has set OMP_NUM_THREADS.

    Several processes on one machine share its cores evenly. With `tell`, a note says if that is fewer than torch's own.
    For the command line: it counts from the start of the process.
    """
    global _reason
    if _reason:
        return  # chosen already; by now the load is our own
    import torch

    if torch.cuda.is_available():
        return
    if "OMP_NUM_THREADS" in os.environ:
        _reason = "as OMP_NUM_THREADS says"
        return
    processes, cores, default = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), allowed_cores(), torch.get_num_threads()
    busy = 0.0 if processes > 1 else watch.others() * cores / (os.cpu_count() or cores)
    threads = max(1, min(default, round(cores - busy) // processes))
    torch.set_num_threads(threads)
    if processes > 1:
        _reason = f"of {cores} cores, for {processes} processes"
    elif threads < default:
        _reason = f"of {cores} cores, since others keep about {busy:.1f} busy; OMP_NUM_THREADS={default} takes all"
    else:
        _reason = f"of {cores} cores"
    if tell and threads < default:
        say(f"note: {describe_threads()}")


def describe_threads() -> str:
    """'1 thread of 2 cores', and why."""
    import torch

    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}{' ' * bool(_reason)}{_reason}"


def allowed_cores() -> int:
    """The cores that this process may use: those of its affinity, and of a container's share of the CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no limit
        pass
    return cores


def ahead(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """`map` in the pool's threads, in order, at most `depth` items ahead of what is consumed."""
    items = iter(items)
    waiting = deque(pool.submit(function, item) for item in itertools.islice(items, depth))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
    finally:
        for future in waiting:
            future.cancel()
