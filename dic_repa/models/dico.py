"""DiCo: a U-Net of depthwise convolutions with channel attention (arXiv 2505.11196, NeurIPS 2025).

Its last stage stays as wide as level 1, 2C, and is modulated by the condition of level 1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.models.stages import StageBlock, StagedUNet, modulated_norm


class DiCoBlock(StageBlock):
    """Modulated LayerNorm, 1x1 conv, depthwise 3x3 conv, GELU, channel attention, 1x1 conv, gate, plus the input; then
    modulated LayerNorm, two 1x1 convs with a GELU between them, gate, plus their input.

    The compact channel attention weighs each channel by the sigmoid of a linear map of all channels' means.
    """

    def __init__(self, width: int, mlp_ratio: int):
        super().__init__(width, mlp_ratio)
        self.modulation = nn.Linear(width, 6 * width)
        self.conv1 = nn.Conv2d(width, width, 1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.attention = nn.Conv2d(width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.mlp1 = nn.Conv2d(width, mlp_ratio * width, 1)
        self.mlp2 = nn.Conv2d(mlp_ratio * width, width, 1)

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, :, None, None].chunk(6, dim=1)
        h = F.gelu(self.depthwise(self.conv1(modulated_norm(x, shift1, scale1))))
        h = self.conv2(h * self.attention(h.mean(dim=(2, 3), keepdim=True)).sigmoid())
        x = torch.addcmul(x, gate1, h)
        h = self.mlp2(F.gelu(self.mlp1(modulated_norm(x, shift2, scale2))))
        return torch.addcmul(x, gate2, h)


class DiCo(StagedUNet):
    __doc__ = StagedUNet.__doc__
    block, last_level, further_conv = DiCoBlock, 1, False
