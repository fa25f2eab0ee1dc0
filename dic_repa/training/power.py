"""A GPU's power draw, as nvidia-smi reports it."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading

import torch


class PowerMeter:
    """Samples the power of `device` in a thread while it is open; `watts` is their mean.

    None where there is no NVIDIA GPU, no nvidia-smi, or no sample.
    """

    def __init__(self, device: torch.device, interval: float = 0.1):
        self.interval = interval
        self._samples: list[float] = []
        self._stop = threading.Event()
        self._command = None
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._command = ["nvidia-smi", "-i", uuid, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]

    def __enter__(self) -> PowerMeter:
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self._command:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._command:
            self._thread.join()

    def forget(self) -> None:
        """Leave out what was sampled so far."""
        self._samples = []

    @property
    def watts(self) -> float | None:
        return statistics.mean(self._samples) if self._samples else None

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            done = subprocess.run(self._command or (), capture_output=True, text=True, check=False)
            try:
                self._samples.append(float(done.stdout))
            except ValueError:  # "[N/A]"
                return
