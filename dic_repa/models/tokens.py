"""What the transformers share: blocks that can be recomputed, and the way between tokens and maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dic_repa.errors import UserError


class RecomputableBlock(nn.Module):
    """A block that computes `_forward`, with `gradient_checkpointing` a second time in the backward pass."""

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False

    def forward(self, *inputs: Tensor) -> Tensor:
        # Checkpointing sits inside the module's call so that a tap's forward hook fires once, not again in the
        # recomputation.
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, *inputs, use_reentrant=False)
        return self._forward(*inputs)


def patch_grid(name: str, size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches; a UserError that speaks of model `name` where `size` (H, W) does not divide."""
    height, width = size
    if height % patch_size or width % patch_size:
        raise UserError(
            f"{name} takes heights and widths divisible by its patch size {patch_size}, not {height}x{width}"
        )
    return height // patch_size, width // patch_size


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, h * w, C), row by row, as a feature map (B, C, h, w); a view."""
    return tokens.mT.unflatten(2, grid)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Tokens (B, h * w, C * p * p) as an image (B, C, h * p, w * p)."""
    return F.pixel_shuffle(to_map(tokens, grid), patch_size)
