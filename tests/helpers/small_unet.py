"""A small U-Net of diffusers."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel


def small_unet(seed: int = 0) -> UNet2DModel:
    """For digits of 16 px, in training mode; `mid_block` is a map of 8x8."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
