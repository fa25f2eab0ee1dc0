"""A wide head at the end of DiC, for latents of many channels: RAE's DDT head (arXiv 2510.11690), of DiC's blocks.

Noise fills all channels of the data, so a network that predicts it, or a velocity, must be at least as wide as the data
has channels (RAE, section 4). A wide DiC is expensive; a few wide blocks at its end are not. They see the noisy input
itself through a stem of their own, so nothing of it has to pass through the narrower levels, and what these have found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.errors import UserError, unknown_name
from dic_repa.models.layers import Modules

WideHeadOption = dict[str, Any] | None  # as a constructor takes it: {width: 1536, depth: 2}


class WideHead(nn.Module):
    """`depth` blocks of `width` channels on the noisy input, which the first takes with the last decoder stage's output
    behind it, as a decoder's block takes a skip. RAE's blocks are a transformer's, modulated by that output.

    Args:
        in_channels: of the noisy input, as level 0 sees it.
        joined: channels of the decoder's output.
        condition_width: of level 0's condition, which modulates these blocks too.
        make: a block from its input's channels, its own, and the condition's.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        in_channels: int,
        joined: int,
        condition_width: int,
        make: Callable[[int, int, int], nn.Module],
    ):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = Modules(make(width + (0 if j else joined), width, condition_width) for j in range(depth))

    def forward(self, x: Tensor, decoded: Tensor, c: Tensor) -> Tensor:
        """From x (B, in_channels, H, W), decoded (B, joined, H, W) and c (B, condition_width) to (B, width, H, W)."""
        x = torch.cat([self.stem(x), decoded], dim=1)
        for block in self.blocks:
            x = block(x, c)
        return x


def read_wide_head(given: Mapping[str, Any], channels: int) -> tuple[int, int]:
    """Width and depth of the option `wide_head`, for data of so many channels as level 0 sees them.

    Raises:
        UserError: another key, no whole number, or a width below that of the data, which such a head is there to pass.
    """
    for key in given:
        if key not in ("width", "depth"):
            raise unknown_name("key of wide_head", str(key), ("width", "depth"))
    width, depth = (_whole(given.get(key)) for key in ("width", "depth"))
    if not width or not depth:
        raise UserError(f"wide_head {dict(given)}: give width and depth, such as {{width: 1536, depth: 2}}")
    if width < channels:
        raise UserError(f"wide_head: width {width} is below the {channels} channels that it has to pass; give more")
    return width, depth


def _whole(value: Any) -> int:
    """A whole number of at least 1, or 0 for anything else."""
    return value if type(value) is int and value >= 1 else 0
