"""An encoder's tokens as a picture: their first three principal components as red, green and blue."""

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dic_repa.files.pictures import to_pil


def principal_components(tokens: Tensor, count: int = 3) -> Tensor:
    """The coordinates (N, count) of tokens (N, D) along their directions of largest variance, largest first.

    If there are fewer directions, the rest is zero. The largest coordinate of each is positive, since the
    decomposition's sign is arbitrary and would change the picture.
    """
    centred = tokens.double() - tokens.double().mean(dim=0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = F.pad(left * singular, (0, max(0, count - len(singular))))[:, :count]
    largest = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True))
    return coordinates * torch.where(largest < 0, -1.0, 1.0)


def token_picture(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (N, D) of a `grid` (h, w) as a picture (3, h, w) in [0, 1], each component stretched to that range."""
    components = principal_components(tokens)
    low, high = components.amin(dim=0), components.amax(dim=0)
    # Rounding errors must not be stretched into a pattern.
    ranges = (high - low).clamp(min=max(1e-12, 1e-6 * float((high - low).max())))
    return rearrange(((components - low) / ranges).float(), "(h w) c -> c h w", h=grid[0], w=grid[1])


def token_sheet(image: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Image.Image:
    """An image (3, H, H) in [0, 1] and the picture of its tokens side by side, at least 256 pixels high."""
    height = max(256, image.shape[-1])
    panels = [F.interpolate(part[None], (height, height))[0] for part in (image, token_picture(tokens, grid))]
    return to_pil(torch.cat([panels[0], torch.ones(3, height, 8), panels[1]], dim=2))
