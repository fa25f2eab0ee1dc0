"""Timing several things against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dic_repa.runtime.progress import progress_bar


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: one number for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float(low), float(high)


def interleave(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    rounds: int = 7,
    seconds: float = 0.2,
    warmup: int = 2,
    description: str = "timing",
) -> list[Timing]:
    """Time each of the `calls` in `rounds` rounds, one after the other within a round, and from another start in each.

    A round's number is the mean over as many calls as fill `seconds`; on a GPU it lies between two events on the
    stream, with the device idle before. Each call is made `warmup` times first, which compiles what is compiled.
    """
    repeats = []
    with progress_bar(total=len(calls) * (rounds + 1), desc=description, leave=False) as bar:
        for call in calls:
            for _ in range(max(1, warmup)):
                once = _time(call, 1, device)
            repeats.append(max(1, round(seconds / max(once, 1e-9))))
            bar.update()
        samples: list[list[float]] = [[] for _ in calls]
        for round_ in range(rounds):
            for k in range(len(calls)):
                k = (k + round_) % len(calls)
                samples[k].append(_time(calls[k], repeats[k], device))
                bar.update()
    return [Timing(tuple(sample)) for sample in samples]


def _time(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one call, as the mean over `repeats` calls."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) / repeats
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000 / repeats
