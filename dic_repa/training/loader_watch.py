"""A stalled loader is named, instead of a run that stands still and says nothing."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator

from accelerate import Accelerator
from tqdm import tqdm


class LoaderWatch:
    """Names a stalled loader: a warning where a batch has not come for `timeout` seconds, again at twice that, ..."""

    def __init__(self, timeout: float, accelerator: Accelerator):
        self.timeout, self.process = timeout, accelerator.process_index
        self.step, self.since, self.patience = 0, math.inf, timeout  # inf: nothing is waited for
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="loader watch", daemon=True)
        self.thread.start()

    @contextlib.contextmanager
    def waiting_for(self, step: int) -> Iterator[None]:
        self.step, self.patience, self.since = step, self.timeout, time.monotonic()
        try:
            yield
        finally:
            self.since = math.inf

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.closed.wait(min(1.0, self.timeout / 4)):
            waited = time.monotonic() - self.since
            if waited > self.patience:
                self.patience *= 2
                tqdm.write(
                    f"warning: process {self.process} has waited {waited:.0f} s for the batch of step {self.step}: the "
                    "loader is stalled (a slow or dead disk or network? see data.workers)",
                    file=sys.stderr,
                )
