"""FCDM, the fully convolutional diffusion model: a U-Net of ConvNeXt V2's blocks with adaLN (CVPR 2026)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.models.stages import StageBlock, StagedUNet, modulated_norm


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's normalization (arXiv 2301.00808): each channel is weighed by its norm over the map, relative to the
    mean of all channels' norms. (B, width, H, W) to the same; it begins as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        relative = norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
        weight = 1 + self.scale[:, None, None] * relative
        # Under autocast these are float32, and would make so wide a map float32 too.
        return torch.addcmul(self.shift[:, None, None].to(x.dtype), x, weight.to(x.dtype))


class ConvNeXtBlock(StageBlock):
    """Depthwise 7x7 conv, modulated LayerNorm, 1x1 conv, GELU, global response norm, 1x1 conv, gate, plus the input."""

    def __init__(self, width: int, mlp_ratio: int):
        super().__init__(width, mlp_ratio)
        self.modulation = nn.Linear(width, 3 * width)
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.mlp1 = nn.Conv2d(width, mlp_ratio * width, 1)
        self.norm = GlobalResponseNorm(mlp_ratio * width)
        self.mlp2 = nn.Conv2d(mlp_ratio * width, width, 1)

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c)[:, :, None, None].chunk(3, dim=1)
        h = self.mlp1(modulated_norm(self.depthwise(x), shift, scale))
        return torch.addcmul(x, gate, self.mlp2(self.norm(F.gelu(h))))


class FCDM(StagedUNet):
    __doc__ = StagedUNet.__doc__
    block, last_level, further_conv = ConvNeXtBlock, 0, True
