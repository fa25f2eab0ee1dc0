"""What the denoisers share: the embedding of the condition, blocks that are recomputed, and feature maps in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dic_repa.conditions import VectorCondition
from dic_repa.errors import UserError

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class Modules(nn.ModuleList, Generic[M]):  # torch's own says no more of an element than that it is a Module
        def __init__(self, modules: Iterable[M] = ()): ...
        def __getitem__(self, index: int) -> M: ...  # type: ignore[override]  # slices are not used
        def __iter__(self) -> Iterator[M]: ...
else:
    Modules = nn.ModuleList


class RecomputableBlock(nn.Module):
    """A block that computes `_forward`; with `gradient_checkpointing`, again in the backward pass."""

    _forward: Callable[..., Tensor]  # a subclass defines it

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False

    def forward(self, *inputs: Tensor) -> Tensor:
        # Inside the module's call, so that a tap's forward hook runs once, not again in the recomputation.
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, *inputs, use_reentrant=False)
        return self._forward(*inputs)


def timestep_embedding(t: Tensor, width: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of t (B,) as (B, width), float32: cosines in the first half, sines in the second."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Condition(nn.Module):
    """SiLU(c), with which every use of c begins, of one level: c is the sum of a timestep embedding and a row of a
    label table (or a linear map of a vector), both as wide as the level."""

    def __init__(self, width: int, num_classes: int, time_scale: float, vector: VectorCondition | None = None):
        super().__init__()
        self.time_scale = time_scale
        self.time1 = nn.Linear(256, width)
        self.time2 = nn.Linear(width, width)
        self.label = VectorEmbedding(vector, width) if vector else nn.Embedding(num_classes + 1, width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if t.stride(0) == 0:  # expanded from one time, as samplers do: embedded once, for all rows
            t = t[:1]
        embedding = timestep_embedding(t * self.time_scale).to(self.time1.weight.dtype)
        return F.silu(self.time2(F.silu(self.time1(embedding))) + self.label(y))


class VectorEmbedding(nn.Linear):
    """A linear map of vectors (B, dim) to (B, width); a learnt vector replaces the null, which is NaN."""

    def __init__(self, vector: VectorCondition, width: int):
        super().__init__(vector.shape[0], width)
        learnt = vector.null_kind == "learnt"
        self.null = nn.Parameter(torch.zeros(vector.shape[0])) if learnt else None

    def forward(self, y: Tensor) -> Tensor:
        y = y.to(self.weight.dtype)
        return super().forward(y if self.null is None else torch.where(y.isnan(), self.null, y))


def layout_of(tensor: Tensor) -> torch.memory_format:
    """channels_last or contiguous, for a feature map or weight of several channels and larger than 1x1; any other
    tensor has both layouts at once."""
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def pixel_shuffle(x: Tensor) -> Tensor:
    """`F.pixel_shuffle` by 2, (B, 4C, H, W) to (B, C, 2H, 2W), which keeps channels_last: torch's own does not on a
    GPU, and the next layers would copy there and back."""
    if not (x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)):
        return F.pixel_shuffle(x, 2)
    shuffled = rearrange(x, "b (c i j) h w -> b (h i) (w j) c", i=2, j=2)  # copied once, in this order
    return rearrange(shuffled, "b h w c -> b c h w")


def patch_grid(name: str, size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches; a UserError that names the model if they do not divide the `size` (H, W)."""
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
