"""A second head on a middle block of a denoiser, for internal guidance (Zhou et al., arXiv 2512.24176).

It is trained for what the denoiser itself is trained for, from less of the network, so it is a weaker model that costs
no run of its own: sampling moves away from it (`samplers/guidance.py`). A denoiser with a head gives both predictions,
(B, 2C, H, W): its own in the first half of the channels, the head's in the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import UserError, unknown_name
from dic_repa.models.pretrained import Pretrained, forward_on_meta

WEIGHT = 0.5  # of the head's loss beside the denoiser's, as in the paper
MiddleHeadOption = str | dict[str, Any] | None  # as a constructor takes it: `mid.0`, or {tap: mid.0, weight: 0.5}


class MiddleHead(nn.Module):
    """The denoiser's prediction from a block's feature map: LayerNorm, modulation, and a linear layer to the pixels of
    each of the map's places, as SiT's last layer. It begins at zero, and draws no random numbers.

    Args:
        channels: of the feature map.
        condition_width: of the vector that the block is modulated by; 0 for a block without, and then for its head.
        out_channels: of the data.
        side: pixels of the data on a side of one place of the map.
        loss_weight: of the head's loss beside the denoiser's own.
    """

    def __init__(self, channels: int, condition_width: int, out_channels: int, side: int, loss_weight: float):
        super().__init__()
        self.side, self.loss_weight = side, loss_weight
        with torch.random.fork_rng(devices=[]):  # so that all that is made later is as without a head
            self.modulation = nn.Linear(condition_width, 2 * channels) if condition_width else None
            self.linear = nn.Linear(channels, out_channels * side**2)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self._kept: tuple[Tensor, Tensor | None] | None = None

    def forward(self, feature: Tensor, c: Tensor | None) -> Tensor:
        """From (B, channels, h, w) and the block's condition (B, condition_width) to (B, out_channels, H, W)."""
        x = rearrange(feature, "b c h w -> b h w c")
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        if self.modulation is not None and c is not None:
            shift, scale = self.modulation(c)[:, None, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return F.pixel_shuffle(rearrange(self.linear(x), "b h w c -> b c h w"), self.side)

    # Hooks that are methods of a submodule: a copy of the denoiser has those of its own head.
    def keep(self, _block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A hook of the tapped block: keeps what it gave, and by what it was modulated."""
        self._kept = output, condition_in(inputs) if self.modulation is not None else None

    def join(self, denoiser: nn.Module, _inputs: tuple[Any, ...], prediction: Tensor) -> Tensor:
        """A hook of the denoiser: its prediction (B, C, H, W) and then the head's, (B, 2C, H, W)."""
        kept, self._kept = self._kept, None
        if kept is None:
            raise UserError("the block of model.options.middle_head did not run; name another one")
        feature, c = kept
        return torch.cat([prediction, self(as_map(denoiser, feature, prediction), c)], dim=1)


def add_middle_head(denoiser: Pretrained, given: MiddleHeadOption) -> None:
    """Give `denoiser` a `middle_head`, at the end of its constructor; None for none.

    Args:
        given: the tapped block's name, such as 'mid.0'; or `tap` and the `weight` of the head's loss, 0.5 by default.

    Raises:
        UserError: there is no such block or key, the block gives no feature map whose places are squares of the data's
            pixels, or the denoiser has other channels than the data (`learn_sigma`).
    """
    if given is None:
        return
    tap, weight = _read(given)
    blocks = dict(denoiser.named_modules())
    if not tap or tap not in blocks:
        raise unknown_name("tap of the middle head", tap, [name for name in blocks if name])
    seen: list[tuple[tuple[Any, ...], Any]] = []
    handle = blocks[tap].register_forward_hook(lambda _block, inputs, output: seen.append((inputs, output)))
    size = getattr(denoiser, "size", None)
    size = size or math.lcm(16 * getattr(denoiser, "patch_size", 1), getattr(denoiser, "multiple", 1))
    try:
        prediction = forward_on_meta(denoiser, size, size)
    finally:
        handle.remove()
    if prediction.shape[1] != denoiser.in_channels:
        raise UserError(
            f"middle_head needs a denoiser that gives the data's {denoiser.in_channels} channels, not "
            f"{prediction.shape[1]}: set learn_sigma to false, or leave middle_head out"
        )
    if len(seen) != 1 or not isinstance(seen[0][1], Tensor) or seen[0][1].ndim not in (3, 4):
        raise UserError(f"middle_head: '{tap}' is no block that gives one feature map; name another, such as a block's")
    inputs, output = seen[0]
    feature, c = as_map(denoiser, output, prediction), condition_in(inputs)
    side = size // feature.shape[-1]
    if tuple(feature.shape[-2:]) != (size // side, size // side):
        raise UserError(f"middle_head: the places of '{tap}' are no squares of the data's pixels; name another block")
    width = 0 if c is None else c.shape[1]
    head = MiddleHead(feature.shape[1], width, denoiser.in_channels, side, weight)
    denoiser.middle_head = head
    blocks[tap].register_forward_hook(head.keep)
    denoiser.register_forward_hook(head.join)


def _read(given: str | Mapping[str, Any]) -> tuple[str, float]:
    options = {"tap": given} if isinstance(given, str) else dict(given)
    for key in options:
        if key not in ("tap", "weight"):
            raise unknown_name("key of middle_head", str(key), ("tap", "weight"))
    weight = options.get("weight", WEIGHT)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise UserError(f"middle_head: weight {weight!r}: give a number of at least 0, 0.5 as in the paper")
    return str(options.get("tap", "")), float(weight)


def condition_in(inputs: tuple[Any, ...]) -> Tensor | None:
    """The vectors (B, D) that a block was called with after its feature map; None without."""
    given = inputs[1] if len(inputs) > 1 else None
    return given if isinstance(given, Tensor) and given.ndim == 2 else None


def as_map(denoiser: Any, output: Tensor, prediction: Tensor) -> Tensor:
    """What a block gave as a map (B, C, h, w): tokens (B, N, C) are laid out by the denoiser's own `feature_map`."""
    if output.ndim == 4:
        return output
    if not hasattr(denoiser, "feature_map"):
        raise UserError("middle_head on tokens needs a denoiser with a feature_map(tokens, size) to lay them out")
    return denoiser.feature_map(output, (prediction.shape[-2], prediction.shape[-1]))
