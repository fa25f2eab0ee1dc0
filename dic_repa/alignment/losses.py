"""What an alignment compares by, such as the two terms of U-REPA (arXiv 2503.18414), in float32 or better whatever
comes in; and what is done to an encoder's tokens (B, N, D) before the comparison.

Normalising in half precision has given NaN after 70 to 160 thousand steps, so nothing here runs under autocast.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

from dic_repa.errors import UserError
from dic_repa.registry import Registry
from dic_repa.runtime.processes import gather_with_gradient

targets = Registry("target", key="alignments.0.target")
alignment_losses = Registry("alignment loss", key="alignments.0.loss")


@targets.register("tokens")
class Tokens:
    """The tokens as they are."""

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens


@targets.register("spatial-norm")
class SpatialNorm:
    """iREPA's spatial normalisation (arXiv 2512.10794): `z = (y - gamma mean(y)) / (std(y) + eps)`.

    Mean and standard deviation (with N - 1) are those of each channel over an image's tokens. It removes most of what
    the tokens have in common: what counts is where they differ. In float32 or better.
    """

    def __init__(self, gamma: float = 0.6, eps: float = 1e-6):
        self.gamma, self.eps = float(gamma), float(eps)

    def __call__(self, tokens: Tensor) -> Tensor:
        tokens = tokens.double() if tokens.itemsize > 4 else tokens.float()
        mean, std = tokens.mean(dim=1, keepdim=True), tokens.std(dim=1, keepdim=True)
        return (tokens - self.gamma * mean) / (std + self.eps)


@alignment_losses.register("u-repa")
@dataclass(frozen=True)
class URepaLoss:
    """The token loss plus w times the manifold loss (U-REPA, arXiv 2503.18414); with w = 0 it is REPA's."""

    manifold_weight: float = 3.0

    def __call__(self, projection: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,) of a projection against target tokens, both (B, N, D), and its terms (B,) by their names in the
        log."""
        token = token_loss(projection, target)
        if not self.manifold_weight:
            return token, {"token": token, "manifold": torch.zeros_like(token)}
        manifold = manifold_loss(projection, target)
        return token + self.manifold_weight * manifold, {"token": token, "manifold": manifold}


@alignment_losses.register("smooth-l1")
@dataclass(frozen=True)
class SmoothL1:
    """The mean of d^2 / (2 beta) where |d| < beta and |d| - beta / 2 elsewhere, for the difference d: SRA's loss."""

    beta: float = 0.05

    def __call__(self, projection: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `URepaLoss`, for tokens of the same width."""
        with torch.autocast(projection.device.type, enabled=False):
            values = F.smooth_l1_loss(_full(projection), _full(target), beta=self.beta, reduction="none")
        distance = reduce(values, "b n d -> b", "mean")
        return distance, {"distance": distance}


@alignment_losses.register("dispersive")
@dataclass(frozen=True)
class Dispersive:
    """`log mean_ij exp(-|z_i - z_j|^2 / (tau n))` over all pairs of the batch, i = j too: it drives features apart.

    The dispersive loss of arXiv 2506.09027 (InfoNCE with the squared l2 distance): no teacher, no head. z_i are all n
    values of image i's feature map; its code divides by n. Its weight is 0.5 there, tau 0.5 at a quarter of the depth
    (or 0.25 and tau 1 at the last block).

    The batch is that of all processes, so that their number changes nothing; of a step in several passes
    (`micro_batch`), it is one pass.
    """

    tau: float = 1.0
    needs_target: ClassVar[bool] = False

    def __post_init__(self):
        if not self.tau > 0:
            raise UserError(f"loss 'dispersive': tau lies above 0, not at {self.tau}")

    def __call__(self, projection: Tensor, target: None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The same loss for each image (B,), of feature maps as tokens (B, N, D)."""
        with torch.autocast(projection.device.type, enabled=False):
            z = gather_with_gradient(_full(projection).flatten(1))
            squared = torch.pdist(z).square() / z.shape[1]  # of each pair once
            twice, itself = math.log(2) - squared / self.tau, squared.new_zeros(len(z))
            loss = torch.logsumexp(torch.cat([twice, itself]), dim=0) - 2 * math.log(len(z))
        each = loss.expand(len(projection))
        return each, {"dispersive": each}


def token_loss(projection: Tensor, target: Tensor) -> Tensor:
    """Minus the cosine similarity of each token with its target, averaged over an image's tokens.

    `-1/N sum_n cos(h_n, y_n)` for projection h and target y, both (B, N, D); returns (B,), float32, in [-1, 1].
    """
    with torch.autocast(projection.device.type, enabled=False):
        return -F.cosine_similarity(_full(projection), _full(target), dim=-1).mean(dim=-1)


def manifold_loss(projection: Tensor, target: Tensor) -> Tensor:
    """How far the similarities between an image's tokens are from those between its targets.

    `1/N^2 sum_ij (cos(y_i, y_j) - cos(h_i, h_j))^2` for projection h and target y, both (B, N, D), which may differ
    in D; returns (B,), float32.
    """
    with torch.autocast(projection.device.type, enabled=False):
        h, y = F.normalize(_full(projection), dim=-1), F.normalize(_full(target), dim=-1)
        return reduce((y @ y.mT - h @ h.mT).square(), "b n m -> b", "mean")


def _full(tokens: Tensor) -> Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))
