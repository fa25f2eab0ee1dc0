"""A GPU's power draw, as nvidia-smi reports it."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading

import torch


class PowerMeter:
    """Samples the power of `device` in a thread while it is open; `watts` is the mean of what was kept.

    None where there is no NVIDIA GPU, no nvidia-smi, or no sample.
    """

    def __init__(self, device: torch.device, interval: float = 0.1):
        self.interval = interval
        self._samples: list[float] = []
        self._kept: list[float] = []
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

    def keep_last(self) -> None:
        """Forget all samples but those since the last call."""
        self._kept, self._samples = self._samples, []

    @property
    def watts(self) -> float | None:
        return statistics.mean(self._kept) if self._kept else None

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            done = subprocess.run(self._command, capture_output=True, text=True, check=False)
            try:
                self._samples.append(float(done.stdout))
            except ValueError:  # "[N/A]"
                return
