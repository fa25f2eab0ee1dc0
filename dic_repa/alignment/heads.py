"""Heads: they project a tapped feature map to the width and the token grid of an encoder.

A head is made as `head(channels, embed_dim, grid, **options)` and called as `head(feature (B, C, h, w), t (B,))`, t in
[0, 1]; it returns tokens (B, N, embed_dim) in row-major order, N = grid[0] * grid[1]. `register_head` adds your own.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import UserError
from dic_repa.models.layers import timestep_embedding, to_tokens
from dic_repa.registry import Registry

heads = Registry("head", modules=["dic_repa.alignment.masked_adapter"], key="alignments.0.head")
register_head = heads.register
"""Decorator that registers its class as the head of this name."""


@register_head("mlp")
class MLPHead(nn.Module):
    """U-REPA's head: an MLP on each token of the U-Net's grid, *then* bilinear upsampling to the encoder's grid.

    Linear, SiLU, linear, SiLU, linear, initialised as in REPA. This order gave the best FID in the paper, 5.72 against
    5.84 (upsampling first) and 6.36 (inside the MLP), of SiT↓; it is also the cheapest: the MLP sees a quarter of the
    tokens.
    """

    def __init__(self, channels: int, embed_dim: int, grid: tuple[int, int], hidden: int = 2048):
        super().__init__()
        self.grid = grid
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, embed_dim)
        )
        self.layers.apply(start_as_repa)

    def forward(self, feature: Tensor, t: Tensor) -> Tensor:
        return to_tokens(upsample(per_token(self.layers, feature), self.grid))


@register_head("mlp-upsample-first")
class UpsampleFirstMLPHead(MLPHead):
    """The MLP on each token of the encoder's grid: upsampling first."""

    def forward(self, feature: Tensor, t: Tensor) -> Tensor:
        return to_tokens(per_token(self.layers, upsample(feature, self.grid)))


@register_head("mlp-upsample-between")
class UpsampleBetweenMLPHead(MLPHead):
    """Upsampling inside the MLP, bilinearly after its first layer; the paper's is a linear layer and pixel-shuffle."""

    def forward(self, feature: Tensor, t: Tensor) -> Tensor:
        hidden = upsample(per_token(self.layers[:2], feature), self.grid)
        return to_tokens(per_token(self.layers[2:], hidden))


@register_head("time-aware")
class TimeAwareHead(MLPHead):
    """U-REPA's time-aware head: `projection * gamma(t) + beta(t)`, FID 5.63 in the paper (of SiT↓), 5.72 without.

    gamma and beta of each channel come from 256 sinusoids of 1000 t, a linear layer, a SiLU and a linear layer. They
    start at 1 and 0, which makes it the MLP head.
    """

    def __init__(self, channels: int, embed_dim: int, grid: tuple[int, int], hidden: int = 2048, time_width: int = 256):
        super().__init__(channels, embed_dim, grid, hidden)
        last = nn.Linear(time_width, 2 * embed_dim)
        self.time = nn.Sequential(nn.Linear(256, time_width), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, feature: Tensor, t: Tensor) -> Tensor:
        gamma, beta = self.time(timestep_embedding(1000 * t)).unsqueeze(1).chunk(2, dim=-1)
        return super().forward(feature, t) * (1 + gamma) + beta


@register_head("linear")
class LinearHead(nn.Module):
    """One linear layer on each token of the U-Net's grid, initialised as in REPA; then upsampling."""

    def __init__(self, channels: int, embed_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.layer = nn.Linear(channels, embed_dim)
        start_as_repa(self.layer)

    def forward(self, feature: Tensor, t: Tensor) -> Tensor:
        return to_tokens(upsample(per_token(self.layer, feature), self.grid))


@register_head("conv")
class ConvHead(nn.Module):
    """iREPA's head (arXiv 2512.10794): one 3x3 convolution, padded to keep the U-Net's grid; then upsampling.

    Initialised by PyTorch, as there."""

    def __init__(self, channels: int, embed_dim: int, grid: tuple[int, int], kernel_size: int = 3):
        super().__init__()
        self.grid = grid
        self.layer = nn.Conv2d(channels, embed_dim, kernel_size, padding="same")

    def forward(self, feature: Tensor, t: Tensor) -> Tensor:
        return to_tokens(upsample(self.layer(feature), self.grid))


@register_head("identity")
class IdentityHead(nn.Module):
    """The feature map itself, without parameters: for losses and teachers that ask for no projection."""

    def __init__(self, channels: int, embed_dim: int, grid: tuple[int, int]):
        super().__init__()
        if channels != embed_dim:
            raise UserError(
                f"head 'identity' changes no widths, but the tap has {channels} channels and its target {embed_dim}; "
                "take head: linear or mlp"
            )
        self.grid = grid

    def forward(self, feature: Tensor, t: Tensor) -> Tensor:
        return to_tokens(upsample(feature, self.grid))


def start_as_repa(layer: nn.Module) -> None:
    """Set a linear layer's weight to Xavier's uniform distribution and its bias to zero."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


def per_token(layers: nn.Module, feature: Tensor) -> Tensor:
    """`layers` on the channels of each position of a feature map (B, C, h, w)."""
    return rearrange(layers(rearrange(feature, "b c h w -> b h w c")), "b h w c -> b c h w")


def upsample(feature: Tensor, grid: tuple[int, int]) -> Tensor:
    """A feature map (B, C, h, w) resized bilinearly to `grid`, in float32 where it changes."""
    if tuple(feature.shape[-2:]) == tuple(grid):
        return feature
    return F.interpolate(feature.float(), grid, mode="bilinear", align_corners=False)
