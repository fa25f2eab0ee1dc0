"""The peak memory of writing an `.npz`.

python tests/scripts/measure_npz_memory.py OUT.npz [--num 50000] [--size 256]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dic_repa.files.npz import write_npz


def batches(num: int, size: int, batch: int = 256) -> Iterator[np.ndarray]:
    """Random images, a copy of the same ones for each batch."""
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    for start in range(0, num, batch):
        yield images[: num - start].copy()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("out", type=Path)
parser.add_argument("--num", type=int, default=50_000)
parser.add_argument("--size", type=int, default=256)
arguments = parser.parse_args()
before, begin = peak(), time.perf_counter()
shape = (arguments.num, arguments.size, arguments.size, 3)
write_npz(arguments.out, batches(arguments.num, arguments.size), shape, np.arange(arguments.num) % 1000)
report = {"peak_bytes": peak(), "grown_bytes": peak() - before, "file_bytes": arguments.out.stat().st_size}
print(json.dumps(report | {"seconds": round(time.perf_counter() - begin, 1)}))
