"""The blocks of the paper's ladder, from its first step to the one before DiC's own: `DiC(..., block="gated")`.

The ladder changes one thing at a time: isotropic; with skips; a U-Net with dense skips; sparse skips; an embedding for
each level; modulation between the convolutions instead of before the first; a gate; GELU instead of SiLU. Shape, skips
and embeddings are options of `DiC`; the blocks differ in what they compute and are classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.models.dic import Block, blocks


@blocks.register("gated")
class GatedBlock(Block):
    """DiC's block with SiLU instead of GELU."""

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate, scale, shift = self.modulation(c)[:, :, None, None].chunk(3, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + gate * self.conv2(F.silu(h))


@blocks.register("mid-modulation")
class MidModulationBlock(Block):
    """Modulated between its convolutions, without a gate: GroupNorm, SiLU, conv; GroupNorm, modulate, SiLU, conv."""

    gated = False

    def __init__(self, in_channels: int, channels: int, condition_width: int):
        super().__init__(in_channels, channels, condition_width)
        self.modulation = nn.Linear(condition_width, 2 * channels)

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


@blocks.register("early-modulation")
class EarlyModulationBlock(Block):
    """Modulated before its first convolution, no gate: GroupNorm, modulate, SiLU, conv; GroupNorm, SiLU, conv."""

    gated = False

    def __init__(self, in_channels: int, channels: int, condition_width: int):
        super().__init__(in_channels, channels, condition_width)
        self.modulation = nn.Linear(condition_width, 2 * in_channels)

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(x) * (1 + scale) + shift
        h = self.conv1(F.silu(h))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
