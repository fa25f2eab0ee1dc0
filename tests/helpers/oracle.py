"""DiC written for clarity: eager, contiguous, float32, one plain torch operation after the other.

What the fast paths are checked against, and the slow one that they are timed beside:

    dic-repa bench model DiC-S --baseline tests/helpers/oracle.py:OracleDiC --baseline tests/helpers/oracle.py:PlainDiC

`OracleDiC` writes GroupNorm out as its formula. `PlainDiC` calls torch's, and is what one would write who wants a DiC
and no more: the fairer opponent in a race.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


def conv3x3(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def per_channel(x):
    return x[:, :, None, None]


def sinusoids(t):
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
    angles = t[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class OracleDiC(nn.Module):
    """The same network as `denoiser`, a DiC as the paper has it, with a copy of its weights under the same names."""

    def __init__(self, denoiser):
        super().__init__()
        config = denoiser.config
        self.num_classes, self.in_channels = denoiser.num_classes, denoiser.in_channels
        self.out_channels, self.time_scale = denoiser.out_channels, config["time_scale"]
        width, depths = config["width"], config["depths"]
        wide, wider = 2 * width, 4 * width
        norm = self.group_norm

        self.stem = nn.Conv2d(self.in_channels, width, 3)
        self.condition = nn.ModuleList([Condition(channels, self.num_classes) for channels in (width, wide, wider)])
        self.enc = nn.ModuleList([stage(width, depths[0], norm), stage(wide, depths[1], norm)])
        self.down = nn.ModuleList([Resample(width, width // 2), Resample(wide, wide // 2)])
        self.mid = stage(wider, depths[2], norm)
        self.up = nn.ModuleList([Resample(wide, 2 * wide), Resample(wider, 2 * wider)])
        self.dec = nn.ModuleList(
            [stage(width, depths[4], norm, concatenates=True), stage(wide, depths[3], norm, concatenates=True)]
        )
        self.output = Output(width, self.out_channels)
        self.load_state_dict(denoiser.state_dict())
        self.to(denoiser.stem.weight.device)

    @staticmethod
    def group_norm(x, weight, bias):
        """(x - mean) / sqrt(variance + 1e-5) over each group of channels of an image, min(32, channels / 4) groups."""
        batch, channels, height, width = x.shape
        grouped = x.reshape(batch, min(32, channels // 4), -1)
        mean = grouped.mean(dim=2, keepdim=True)
        variance = ((grouped - mean) ** 2).mean(dim=2, keepdim=True)
        normalised = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(batch, channels, height, width)
        return normalised * weight[None, :, None, None] + bias[None, :, None, None]

    def forward(self, x, t, y):
        c = [condition(t * self.time_scale, y) for condition in self.condition]
        x = conv3x3(self.stem, x)
        skips = []
        for level in (0, 1):
            for blocks_to_go, block in zip(reversed(range(len(self.enc[level]))), self.enc[level]):
                x = block(x, c[level])
                if blocks_to_go % 3 == 0:
                    skips.append(x)
            x = F.pixel_unshuffle(conv3x3(self.down[level].conv, x), 2)
        for block in self.mid:
            x = block(x, c[2])
        for level in (1, 0):
            x = F.pixel_shuffle(conv3x3(self.up[level].conv, x), 2)
            for j, block in enumerate(self.dec[level]):
                if j % 3 == 0:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, c[level])
        return self.output(x, c[0])


class PlainDiC(OracleDiC):
    @staticmethod
    def group_norm(x, weight, bias):
        return F.group_norm(x, min(32, x.shape[1] // 4), weight, bias, 1e-5)


class Condition(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.time1, self.time2 = nn.Linear(256, width), nn.Linear(width, width)
        self.label = nn.Embedding(num_classes + 1, width)

    def forward(self, t, y):
        return F.silu(self.time2(F.silu(self.time1(sinusoids(t).to(self.time1.weight.dtype)))) + self.label(y))


class Block(nn.Module):
    def __init__(self, in_channels, channels, group_norm):
        super().__init__()
        self.group_norm = group_norm
        self.norm1, self.norm2 = nn.GroupNorm(1, in_channels), nn.GroupNorm(1, channels)  # for their parameters' sake
        self.conv1, self.conv2 = nn.Conv2d(in_channels, channels, 3), nn.Conv2d(channels, channels, 3)
        self.modulation = nn.Linear(channels, 3 * channels)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x, c):
        gate, scale, shift = self.modulation(c).chunk(3, dim=1)
        h = self.group_norm(x, self.norm1.weight, self.norm1.bias)
        h = conv3x3(self.conv1, F.gelu(h))
        h = self.group_norm(h, self.norm2.weight, self.norm2.bias)
        h = h * (1 + per_channel(scale)) + per_channel(shift)
        h = conv3x3(self.conv2, F.gelu(h))
        return self.shortcut(x) + per_channel(gate) * h


def stage(channels, depth, group_norm, concatenates=False):
    inputs = [2 * channels if concatenates and j % 3 == 0 else channels for j in range(depth)]
    return nn.ModuleList([Block(in_channels, channels, group_norm) for in_channels in inputs])


class Resample(nn.Module):
    def __init__(self, in_channels, channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, bias=False)


class Output(nn.Module):
    def __init__(self, width, out_channels):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3), nn.Conv2d(width, out_channels, 3)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x, c):
        shift, scale = self.modulation(c).chunk(2, dim=1)
        h = conv3x3(self.conv1, x)
        mean = h.mean(dim=1, keepdim=True)
        variance = ((h - mean) ** 2).mean(dim=1, keepdim=True)
        h = (h - mean) / torch.sqrt(variance + 1e-6)
        return conv3x3(self.conv2, h * (1 + per_channel(scale)) + per_channel(shift))
