"""Random warps of small grey images, a whole batch at a time: what both digit networks are trained on."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def random_warp(
    images: Tensor,
    generator: torch.Generator,
    degrees: float = 15.0,
    scale: float = 0.15,
    shear: float = 0.15,
    shift: float = 0.1,
    elastic: float = 0.03,
) -> Tensor:
    """Images (B, C, H, W), each rotated, scaled, sheared, shifted and bent by its own random amounts.

    Amounts are uniform in plus or minus `degrees`, `scale` (of the size, per axis), `shear` and `shift` (of the width);
    `elastic` (of the width) is the standard deviation of a smooth displacement. Outside the image is black.
    """
    batch = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(batch, generator=generator) * 2 - 1) * limit

    angle, shear_x = uniform(math.radians(degrees)), uniform(shear)
    scale_x, scale_y = 1 + uniform(scale), 1 + uniform(scale)
    cos, sin = angle.cos(), angle.sin()
    # grid_sample's coordinates run from -1 to 1, so a share of the width counts twice.
    rows = [
        torch.stack([cos / scale_x, (shear_x - sin) / scale_y, uniform(2 * shift)], dim=1),
        torch.stack([sin / scale_x, cos / scale_y, uniform(2 * shift)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    bend = torch.randn(batch, 2, 4, 4, generator=generator) * (2 * elastic)
    bend = F.interpolate(bend, images.shape[-2:], mode="bicubic", align_corners=False)
    return F.grid_sample(images, grid + rearrange(bend, "b xy h w -> b h w xy"), align_corners=False)
