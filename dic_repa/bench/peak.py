"""What this device can do at most: the best of a few large matrix products and 3x3 convolutions, in TFLOP/s."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch.nn import functional as F

from dic_repa.bench.device import precision
from dic_repa.bench.timing import interleave
from dic_repa.sampling.sampler import DTYPES

# (batch, channels, side): a CPU's fit its caches, a GPU's are those of DiC-XL at 32x32.
CONVOLUTIONS = {
    "cpu": [(8, 96, 32), (8, 192, 16), (8, 384, 8), (4, 256, 32)],
    "cuda": [(128, 384, 32), (32, 384, 32), (128, 768, 16), (128, 1536, 8), (256, 512, 32)],
}
MATRICES = {"cpu": [1024, 2048], "cuda": [4096, 8192, 16384]}


@torch.no_grad()
def measure_peak(name: str, device: torch.device, rounds: int = 5) -> dict[str, float]:
    """`matrix` and `convolution`: the largest TFLOP/s measured in that precision; a multiply-add is two operations.

    A convolution is counted directly, so one by Winograd's or Fourier's method may exceed the matrix product.
    """
    random = partial(torch.randn, device=device, dtype=DTYPES[name])
    work = [("matrix", 2.0 * n**3, partial(torch.matmul, random(n, n), random(n, n))) for n in MATRICES[device.type]]
    layouts = (torch.channels_last, torch.contiguous_format)
    for (batch, channels, side), layout in itertools.product(CONVOLUTIONS[device.type], layouts):
        x = random(batch, channels, side, side).to(memory_format=layout)
        weight = random(channels, channels, 3, 3).to(memory_format=layout)
        work.append(("convolution", 18.0 * channels**2 * batch * side**2, partial(F.conv2d, x, weight, padding=1)))
    with precision(name):
        timings = interleave([call for *_, call in work], rounds, 0.05, description=f"{name} peak")
    best = {"matrix": 0.0, "convolution": 0.0}
    for (kind, operations, _), timing in zip(work, timings):
        best[kind] = max(best[kind], operations / timing.median / 1e12)
    return best
