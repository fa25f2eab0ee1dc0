"""Vision transformers from timm as frozen encoders: their patch tokens are the targets."""

from __future__ import annotations

from typing import Any

import torch
from einops import reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import UserError


class FrozenViT(nn.Module):
    """A timm ViT as an `Encoder`. A subclass says to which size images are resized.

    Args:
        model: has timm's `forward_intermediates` and `embed_dim`.
        mean, std: of each input channel.
        layer: the index of the block that gives the tokens; -1 is the last.
        norm: whether the tokens pass the final norm, whichever block they come from.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: tuple[float, ...], std: tuple[float, ...], layer: int = -1, norm: bool = True):
        super().__init__()
        depth = len(model.blocks)
        if not -depth <= layer < depth:
            raise UserError(
                f"layer {layer} does not exist: the encoder has {depth} blocks, 0 to {depth - 1} or -1 to {-depth}"
            )
        self.model = model
        self.layer, self.norm = layer, norm
        self.embed_dim: int = model.embed_dim
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenViT:
        """Stays in eval mode, also when the module that holds it is put in train mode."""
        return super().train(False)

    def resize(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) at the size that the model is fed."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W), float in [0, 1], to tokens (B, h * w, embed_dim), row by row."""
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            shape = tuple(images.shape)
            raise UserError(
                f"an encoder takes float images (B, 1 or 3, H, W) in [0, 1], not {images.dtype} of shape {shape}"
            )
        images = _match_channels(images, len(self.mean))
        images = self.resize((images - self.mean) / self.std)
        (tokens,) = self.model.forward_intermediates(
            images, indices=[self.layer], norm=self.norm, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        return tokens


def resize_bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic without antialiasing, as REPA does it."""
    return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bicubic")


def _match_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    if channels == 1:
        return reduce(images, "b c h w -> b 1 h w", "mean")
    return repeat(images, "b 1 h w -> b c h w", c=channels)
