"""What the device can do at most: matrix products, 3x3 convolutions and copies, measured here and now."""

import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch.nn import functional as F

from dic_repa.bench.timing import TORCH_DEFAULT, interleave
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.sampling.sampler import DTYPES

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# (batch, channels, side): a CPU's fit its caches, a GPU's are those of DiC-XL at 32x32.
CONVOLUTIONS = {
    "cpu": [(8, 96, 32), (8, 192, 16), (8, 384, 8), (4, 256, 32)],
    "cuda": [(128, 384, 32), (32, 384, 32), (128, 768, 16), (128, 1536, 8), (256, 512, 32)],
}
MATRICES = {"cpu": [1024, 2048], "cuda": [4096, 8192, 16384]}
COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes, beyond all caches
WARMING = {"cpu": 0.1, "cuda": 1.0}  # seconds: a GPU that was idle takes about one to reach its clock


@torch.no_grad()
def measure_peak(precision: str, device: torch.device, rounds: int = 5) -> dict[str, float]:
    """`matrix` and `convolution`: the TFLOP/s of the best of a few large matrix products and 3x3 convolutions.

    A multiply-add is two operations. A convolution by Winograd's or Fourier's method may exceed the matrix product.
    """
    random = partial(torch.randn, device=device, dtype=DTYPES.get(precision, torch.float32))
    work = [("matrix", 2.0 * n**3, partial(torch.matmul, random(n, n), random(n, n))) for n in MATRICES[device.type]]
    for (batch, channels, side), layout in itertools.product(CONVOLUTIONS[device.type], LAYOUTS.values()):
        x = random(batch, channels, side, side).to(memory_format=layout)
        weight = random(channels, channels, 3, 3).to(memory_format=layout)
        work.append(("convolution", 18.0 * channels**2 * batch * side**2, partial(F.conv2d, x, weight, padding=1)))
    with rounding(precision):
        warm_up(work[0][2], device)
        timings = interleave([call for *_, call in work], rounds, 0.05, description=f"{precision} peak")
    best = {"matrix": 0.0, "convolution": 0.0}
    for (kind, operations, _), timing in zip(work, timings):
        best[kind] = max(best[kind], operations / timing.median / 1e12)
    return best


def measure_bandwidth(device: torch.device, rounds: int = 5) -> float:
    """GB/s that a copy within the device's memory reads and writes, taken together."""
    source, target = torch.zeros(2, COPIED[device.type] // 4, device=device).unbind()
    copy = partial(target.copy_, source)
    warm_up(copy, device)
    (timing,) = interleave([copy], rounds, 0.05, description="copy")
    return 2 * source.nbytes / timing.median / 1e9


def warm_up(call: Callable[[], object], device: torch.device) -> None:
    """Call until the device runs at the clock that it keeps under load."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARMING[device.type]:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def rounding(precision: str, benchmark: bool = True) -> AbstractContextManager[None]:
    """While entered, a GPU rounds the factors of float32 products as the precision says, and cuDNN tries its
    algorithms, as in training and long sampling; not with torch's own flags."""
    default = precision == TORCH_DEFAULT
    return gpu_arithmetic(
        precision == "tf32", convolutions=precision == "tf32" or default, benchmark=benchmark and not default
    )
