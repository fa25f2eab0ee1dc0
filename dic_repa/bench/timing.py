"""Timing several things against each other, on the clock of `torch.utils.benchmark`."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence

from torch.utils.benchmark import Measurement, timer
from torch.utils.benchmark.utils.common import TaskSpec

from dic_repa.runtime.progress import progress_bar


def interleave(
    calls: Sequence[Callable[[], object]],
    rounds: int = 7,
    seconds: float = 0.2,
    warmup: int = 2,
    description: str = "timing",
) -> list[Measurement]:
    """Time the `calls` in turns, so that a clock that sinks slows all of them alike, which one `Timer` each would not.

    Args:
        calls: What to time. Each is called `warmup` times first, which compiles what is compiled.
        rounds: How many times each is measured; each round begins with another of the calls.
        seconds: Length of one measurement: its time is the mean over as many calls as fill it.

    Returns:
        For each of the calls, its seconds in each round.
    """
    timers = [timeit.Timer(call, timer=timer) for call in calls]  # torch's timer waits for the GPU
    repeats = []
    with progress_bar(total=len(calls) * (rounds + 1), desc=description, leave=False) as bar:
        for clock in timers:
            for _ in range(max(1, warmup)):
                once = clock.timeit(1)
            repeats.append(max(1, round(seconds / max(once, 1e-9))))
            bar.update()
        found = [Measurement(count, [], TaskSpec("call()", "")) for count in repeats]
        for round_ in range(rounds):
            for k in range(len(calls)):
                k = (k + round_) % len(calls)
                found[k].raw_times.append(timers[k].timeit(repeats[k]))
                bar.update()
    return found
