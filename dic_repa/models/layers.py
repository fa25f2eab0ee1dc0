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
    """Sinusoids of t (B,) as (B, width), float32 (float64 of such a t): cosines in the first half, then sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    t = t if t.dtype == torch.float64 else t.float()  # torch 2.6 reads no exported `promote_types`
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Condition(nn.Module):
    """SiLU(c), with which every use of c begins, of one level: c is the sum of a timestep embedding and a row of a
    label table (or a linear map of a vector), both as wide as the level; with `two_times`, and of a `SpanEmbedding`.
    Without `silu` it is c itself."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        time_scale: float,
        vector: VectorCondition | None = None,
        two_times: bool = False,
        silu: bool = True,
    ):
        super().__init__()
        self.time_scale, self.silu = time_scale, silu
        self.time1 = nn.Linear(256, width)
        self.time2 = nn.Linear(width, width)
        self.label = VectorEmbedding(vector, width) if vector else nn.Embedding(num_classes + 1, width)
        self.span = SpanEmbedding(width) if two_times else None

    def reset_parameters(self) -> None:
        """N(0, 0.02^2) for the embeddings' weights; the span's adds nothing at first."""
        for layer in (self.time1, self.time2, self.label):
            nn.init.normal_(layer.weight, std=0.02)
        if self.span is not None:
            self.span.reset_parameters()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if t.stride(0) == 0:  # expanded from one time, as samplers do: embedded once, for all rows
            t = t[:1]
        t, span = split_times(t * self.time_scale, self.span is not None)
        c = self.time2(F.silu(self.time1(timestep_embedding(t).to(self.time1.weight.dtype)))) + self.label(y)
        c = c if self.span is None else c + self.span(span)
        return F.silu(c) if self.silu else c


def split_times(t: Tensor, two_times: bool) -> tuple[Tensor, Tensor]:
    """The time and the span t - r, both (B,), of t (B,), which has no span, or of (t, r) (B, 2); a UserError where a
    model is not made for these."""
    if t.ndim == 1:
        return t, torch.zeros_like(t)
    if not two_times:
        raise UserError("this denoiser takes one time; build it with model.options.two_times: true")
    return t[:, 0], t[:, 0] - t[:, 1]


class SpanEmbedding(nn.Module):
    """The span between two times (B,) as (B, width), like a timestep embedding; zero at first, so that a model that has
    learnt without it stays as it is."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Linear(256, width)
        self.linear2 = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.linear1.weight, std=0.02)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)

    def forward(self, span: Tensor) -> Tensor:
        embedding = timestep_embedding(span).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(embedding)))


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


def to_tokens(feature: Tensor) -> Tensor:
    """A feature map (B, C, h, w) as tokens (B, h * w, C), row by row."""
    return rearrange(feature, "b c h w -> b (h w) c")


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Tokens (B, h * w, C * p * p) as an image (B, C, h * p, w * p)."""
    return F.pixel_shuffle(to_map(tokens, grid), patch_size)
