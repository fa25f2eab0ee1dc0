"""3x3 convolutions alone at the shapes of DiC's levels, forwards and backwards: what its blocks could reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from dic_repa.bench.peaks import rounding
from dic_repa.bench.timing import interleave
from dic_repa.sampling.sampler import DTYPES

GRADIENTS = {"dgrad": [True, False, False], "wgrad": [False, True, False]}  # of the input, of the weight


def convolution_cases(
    batch: int, width: int, side: int, kind: str, device: torch.device
) -> Iterator[tuple[str, float, Callable[[], object]]]:
    """A label, the operations and the call of each: three levels, channels_last; the output, the gradient of the input
    (dgrad) and of the weight (wgrad)."""
    random = partial(torch.randn, device=device, dtype=DTYPES.get(kind, torch.float32))
    for level in range(3):
        c, s = width << level, side >> level
        x, g = (random(batch, c, s, s).to(memory_format=torch.channels_last) for _ in range(2))
        weight = random(c, c, 3, 3).to(memory_format=torch.channels_last)
        name, operations = f"3x3, {kind}, {c} channels, {s}x{s}", 18.0 * c**2 * batch * s**2
        yield f"{name}, forward", operations, partial(F.conv2d, x, weight, padding=1)
        rest = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        for gradient, mask in GRADIENTS.items():
            call = partial(torch.ops.aten.convolution_backward, g, x, weight, *rest, mask)
            yield f"{name}, {gradient}", operations, call


@torch.no_grad()
def time_ceiling(call: Callable[[], object], operations: float, kind: str, device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a call; on a GPU also with cuDNN's benchmark mode, which tries its algorithms first."""
    found = {}
    for key, searching in (("tflops", False), ("searched_tflops", True))[: 1 + (device.type == "cuda")]:
        with rounding(kind, searching):
            (timing,) = interleave([call], 5, 0.02, 3, "convolution")
        found[key] = operations / timing.median / 1e12
    return found
