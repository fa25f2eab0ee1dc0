"""Blocks that are computed a second time in the backward pass, to save the memory of their activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class RecomputableBlock(nn.Module):
    """A block that computes `_forward`, with `gradient_checkpointing` a second time in the backward pass."""

    _forward: Callable[..., Tensor]  # a subclass defines it

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False

    def forward(self, *inputs: Tensor) -> Tensor:
        # Checkpointing sits inside the module's call so that a tap's forward hook fires once, not again in the
        # recomputation.
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, *inputs, use_reentrant=False)
        return self._forward(*inputs)
