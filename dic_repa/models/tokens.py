"""What the transformers share: the way between tokens and maps."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from dic_repa.errors import UserError


def patch_grid(name: str, size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches; a UserError that speaks of model `name` where `size` (H, W) does not divide."""
    height, width = size
    if height % patch_size or width % patch_size:
        raise UserError(
            f"{name} takes heights and widths divisible by its patch size {patch_size}, not {height}x{width}"
        )
    return height // patch_size, width // patch_size


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, h * w, C), row by row, as a feature map (B, C, h, w); a view."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=grid[0], w=grid[1])


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Tokens (B, h * w, C * p * p) as an image (B, C, h * p, w * p)."""
    return F.pixel_shuffle(to_map(tokens, grid), patch_size)
