"""The exponential moving average of a denoiser's weights, which is what one samples from."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """`average <- decay * average + (1 - decay) * weights` after each step, in float32.

    Made before the denoiser is wrapped or hooked: `model` is a plain copy of it in eval mode, ready to sample from.
    """

    def __init__(self, denoiser: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(denoiser).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, denoiser: nn.Module) -> None:
        """Move the average towards the denoiser's weights; buffers are copied."""
        torch._foreach_lerp_(list(self.model.parameters()), list(denoiser.parameters()), 1 - self.decay)
        for average, buffer in zip(self.model.buffers(), denoiser.buffers()):
            average.copy_(buffer)
