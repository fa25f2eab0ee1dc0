"""Where in memory the channels of feature maps lie: a network keeps to one layout from end to end, its weights'."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def layout_of(tensor: Tensor) -> torch.memory_format:
    """channels_last or contiguous: the layout of a feature map or of a convolution's weight, of several channels and
    larger than 1x1; any other has both at once.
    """
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def pixel_shuffle(x: Tensor) -> Tensor:
    """`F.pixel_shuffle` by 2, (B, 4C, H, W) to (B, C, 2H, 2W), which keeps channels_last on every device.

    torch's own leaves it on a GPU, and what follows would be copied to it and fro.
    """
    if not (x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)):
        return F.pixel_shuffle(x, 2)
    shuffled = rearrange(x, "b (c i j) h w -> b (h i) (w j) c", i=2, j=2)  # copied once, in this order
    return rearrange(shuffled, "b h w c -> b c h w")
