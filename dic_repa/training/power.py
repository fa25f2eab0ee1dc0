"""A GPU's power draw."""

from __future__ import annotations

import statistics
import threading

import torch


class PowerMeter:
    """Measures the power of a GPU in a thread while it is open; `watts` is the mean, or None if it is not known."""

    def __init__(self, device: torch.device, interval: float = 0.1):
        self.device, self.interval = device, interval
        self._samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if device.type == "cuda" else None

    def __enter__(self) -> PowerMeter:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def forget(self) -> None:
        """Leave out what was sampled so far."""
        self._samples = []

    @property
    def watts(self) -> float | None:
        return statistics.mean(self._samples) if self._samples else None

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._samples.append(torch.cuda.power_draw(self.device) / 1000)
            except Exception:  # the driver's own: it does not report power, such as in some containers
                return
