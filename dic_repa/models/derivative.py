"""How fast the prediction of a denoiser changes along a path, by forward-mode differentiation."""

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def total_derivative(denoiser: nn.Module, x: Tensor, t: Tensor, y: Tensor, tangent: Tensor | None) -> Tensor:
    """d/dt of the prediction at x (B, C, H, W) and times (t, r) (B, 2) while r stays and x moves by `tangent`
    (B, C, H, W), by default the prediction at r = t: (B, C, H, W), without gradients and outside autocast.

    Of the denoiser `forward` is called, and so no hook of its own.
    """
    time, r = t.unbind(1)

    def prediction(x: Tensor, time: Tensor, r: Tensor = r) -> Tensor:
        return denoiser.forward(x, torch.stack([time, r], dim=1), y)[:, : x.shape[1]]  # without a variance

    # Of the kinds of attention only the plain one has a derivative in forward mode.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH), _norms():
        tangent = prediction(x, time, time) if tangent is None else tangent
        return torch.func.jvp(prediction, (x, time), (tangent, torch.ones_like(time)))[1]


class _ContiguousNorms(TorchFunctionMode):
    """Norms of contiguous copies."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return function(*args, **(kwargs or {}))


def _norms() -> AbstractContextManager:
    """What a GroupNorm of channels_last needs to be differentiated: nothing, but with torch 2.6 a copy."""
    return nullcontext() if _differentiates_channels_last() else _ContiguousNorms()


@functools.lru_cache
def _differentiates_channels_last() -> bool:
    """Whether torch has the derivative of a GroupNorm of channels_last. Asked when it is needed: torch then imports
    much."""
    x = torch.ones(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own use of torch.jit
        try:
            torch.func.jvp(lambda x: F.group_norm(x, 2), (x,), (x,))
        except RuntimeError:
            return False
    return True
