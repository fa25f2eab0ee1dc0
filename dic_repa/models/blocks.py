"""What DiC is made of: the blocks of the paper's ladder, what lies between levels, and the last layers."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.models.kernel_choice import use_kernels
from dic_repa.models.layers import RecomputableBlock, layout_of, pixel_shuffle
from dic_repa.registry import Registry

blocks = Registry("block", key="model.options.block")


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of min(32, channels / 4) groups, or of the next fewer that divide the channels evenly."""
    groups = next(g for g in range(max(1, min(32, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


@blocks.register("dic")
class Block(RecomputableBlock):
    """GroupNorm, GELU, conv; GroupNorm, modulate, GELU, conv; gate; plus the input.

    x (B, in_channels, H, W) and c (B, condition width) to (B, channels, H, W).
    """

    gated = True
    kernels = True  # use Triton's kernels where they can be

    def __init__(self, in_channels: int, channels: int, condition_width: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.modulation = nn.Linear(condition_width, 3 * channels)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        if use_kernels(self, x):
            return self._by_kernels(x, c)
        gate, scale, shift = self.modulation(c)[:, :, None, None].chunk(3, dim=1)
        h = self.conv1(F.gelu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)  # one pass over memory, not two, where nothing is compiled
        h = self.conv2(F.gelu(h))
        return torch.addcmul(self.shortcut(x), gate, h)

    def _by_kernels(self, x: Tensor, c: Tensor) -> Tensor:
        """The same; what follows a convolution adds its bias."""
        from dic_repa.models.kernels import gated_residual, norm_gelu  # it needs Triton

        gate, scale, shift = self.modulation(c).chunk(3, dim=1)
        h = F.conv2d(norm_gelu(x, self.norm1), self.conv1.weight, padding=1)
        h = F.conv2d(norm_gelu(h, self.norm2, scale, shift, self.conv1.bias), self.conv2.weight, padding=1)
        return gated_residual(self.shortcut(x), h, gate, self.conv2.bias)


@blocks.register("gated")
class GatedBlock(Block):
    """DiC's block with SiLU instead of GELU."""

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        *gate, scale, shift = self.modulation(c)[:, :, None, None].chunk(2 + self.gated, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.shortcut(x) + (gate[0] * h if gate else h)


@blocks.register("mid-modulation")
class MidModulationBlock(GatedBlock):
    """Modulated between its convolutions, without a gate: GroupNorm, SiLU, conv; GroupNorm, modulate, SiLU, conv."""

    gated, early = False, False

    def __init__(self, in_channels: int, channels: int, condition_width: int):
        super().__init__(in_channels, channels, condition_width)
        self.modulation = nn.Linear(condition_width, 2 * (in_channels if self.early else channels))


@blocks.register("early-modulation")
class EarlyModulationBlock(MidModulationBlock):
    """Modulated before its first convolution, no gate: GroupNorm, modulate, SiLU, conv; GroupNorm, SiLU, conv."""

    early = True

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x) * (1 + scale) + shift))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """Halve height and width, double the channels: a 3x3 conv to half the channels, then pixel-unshuffle.

    With stride 1 height and width stay, and the conv itself goes to twice the channels. `widening` is how many times
    the channels there are behind it, in place of twice.
    """

    def __init__(self, channels: int, stride: int = 2, widening: int = 2):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, widening * channels // stride**2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.pixel_unshuffle(x, 2) if self.stride == 2 else x


class Upsample(nn.Module):
    """Double height and width, halve the channels: a 3x3 conv to twice the channels, then pixel-shuffle.

    With stride 1 height and width stay, and the conv itself goes to half the channels. `narrowing` is how many times
    fewer channels there are behind it, in place of half.
    """

    def __init__(self, channels: int, stride: int = 2, narrowing: int = 2):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride**2 // narrowing, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return pixel_shuffle(x) if self.stride == 2 else x


class Output(nn.Module):
    """A 3x3 conv, LayerNorm over the channels, modulation, and a 3x3 conv to the output's channels.

    x (B, width, H, W) and c (B, condition width) to (B, out_channels, H, W).
    """

    def __init__(self, width: int, out_channels: int, condition_width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(condition_width, 2 * width)
        self.conv2 = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = rearrange(self.conv1(x), "b c h w -> b h w c")  # no copy in channels_last, neither this nor back
        h = rearrange(F.layer_norm(h, h.shape[-1:], eps=1e-6), "b h w c -> b c h w")
        return self.conv2((h * (1 + scale) + shift).contiguous(memory_format=layout_of(x)))
