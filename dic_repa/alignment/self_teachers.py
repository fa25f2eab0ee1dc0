"""Teachers that need no encoder: an alignment's targets are feature maps of the denoiser itself.

Either those of the very pass that is trained, their gradient stopped, or those of the averaged weights, which see the
same data with less noise. `dic_repa.protocols.Teacher` says what one must have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.alignment.taps import Taps
from dic_repa.errors import UserError
from dic_repa.models.layers import to_tokens
from dic_repa.registry import Registry

teachers = Registry("teacher", key="alignments.0.teacher")


@teachers.register("layer-sync")
@dataclass(frozen=True)
class LayerSync:
    """A later tap of the same pass, its gradient stopped (LayerSync, arXiv 2510.12581): no second pass.

    There a transformer's block 8 of 28 follows block 16 by cosine similarity, weight 0.2, without a head. In a U-Net
    blocks of other stages are of other widths, which a head bridges.
    """

    tap: str


@teachers.register("self-alignment")
@dataclass(frozen=True)
class SelfAlignment:
    """A tap of the averaged weights, which see the same data and noise at t - U(0, interval) (SRA, arXiv 2505.02831).

    There block 20 of 28 teaches block 8, by a smooth L1 loss (beta 0.05) of weight 0.2 or by the cosine similarity.
    It costs a forward pass of the averaged weights.
    """

    tap: str
    interval: float = 0.2

    def __post_init__(self):
        if not 0 <= self.interval <= 1:
            raise UserError(f"self-alignment: the interval of time lies in [0, 1], not at {self.interval}")

    def earlier(self, uniform: Tensor) -> Tensor:
        """By how much time less noise the averaged weights see, from random numbers in [0, 1), both (B,)."""
        return self.interval * uniform


@torch.no_grad()
def averaged_tokens(model: nn.Module, tap: str, *inputs: Any, **keywords: Any) -> Tensor:
    """The tokens (B, h * w, C) that the submodule `tap` of a model with averaged weights gives for `inputs`, such as
    (x, t, y), without gradients.

    It listens for this pass alone: the same weights are also sampled from.
    """
    taps = Taps(model, [tap])
    try:
        model(*inputs, **keywords)
        return to_tokens(taps.feature_map(taps.take()[tap], tap))
    finally:
        taps.remove()


def check_objective(objective: Any, averaged: bool) -> None:
    """A UserError if an alignment asks the averaged weights of an objective that has no one noisy state."""
    if averaged and not (hasattr(objective, "with_less_noise") and hasattr(objective, "earlier")):
        raise UserError(
            f"alignments: self-alignment needs an objective that can give the same data with less noise (`earlier`), "
            f"which {type(objective).__name__} cannot; take flow-matching or ddpm"
        )
