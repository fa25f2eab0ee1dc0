"""A small run that is killed and goes on: `python killed_run.py RUN SEEN STEP KEY...`.

A first process, a fork of this one, gets a SIGKILL before its step STEP; a second one resumes the run. The labels of
each batch go into the file SEEN.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from forked import fork
from small_runs import SMALL, small_run

from dic_repa.training.inputs import Batches


def main(run: Path, seen: Path, step: int, *keys: str) -> int:
    """0 if the first process was killed and the second one has ended well."""
    ends = [process(run, seen, last, keys) for last in (step, 0)]
    return ends != [signal.SIGKILL, 0]


def process(run: Path, seen: Path, last: int, keys: tuple[str, ...]) -> int:
    """How a fork has ended, as `os.waitpid` tells it."""

    def work() -> None:
        note(seen, last)
        small_run(run, *keys, resume=not last, base=SMALL)

    return os.waitpid(fork(work), 0)[1]


def note(seen: Path, last: int) -> None:
    """Let the batches be noted in the file `seen`, and a SIGKILL come before the step `last`."""
    read = Batches.__next__

    def noting(self):
        batch = read(self)
        if self.step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        with seen.open("a") as file:
            print(self.step, *batch["label"].tolist(), file=file)
        return batch

    Batches.__next__ = noting


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
