"""What this device can do at most: the best of a few large matrix products and 3x3 convolutions, in TFLOP/s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from dic_repa.bench.device import DTYPES, precision
from dic_repa.bench.timing import interleave

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
    products = [_product(n, DTYPES[name], device) for n in MATRICES[device.type]]
    convolutions = [
        _convolution(*shape, DTYPES[name], device, layout)
        for shape in CONVOLUTIONS[device.type]
        for layout in (torch.channels_last, torch.contiguous_format)
    ]
    work = products + convolutions
    with precision(name):
        timings = interleave([call for call, _ in work], rounds, 0.05, description=f"{name} peak")
    rates = [operations / timing.median / 1e12 for (_, operations), timing in zip(work, timings)]
    return {"matrix": max(rates[: len(products)]), "convolution": max(rates[len(products) :])}


Work = tuple[Callable[[], object], float]  # a call, and how many operations it makes


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Work:
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    return lambda: a @ b, 2.0 * n**3


def _convolution(batch: int, channels: int, side: int, dtype, device: torch.device, layout) -> Work:
    x = torch.randn(batch, channels, side, side, device=device).to(dtype, memory_format=layout)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=layout)
    return lambda: F.conv2d(x, weight, padding=1), 2.0 * 9 * channels**2 * batch * side**2
