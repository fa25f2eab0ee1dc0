"""What is done to an encoder's tokens (B, N, D) before the hidden state is compared with them."""

from __future__ import annotations

from torch import Tensor

from dic_repa.registry import Registry

targets = Registry("target", key="alignments.0.target")


@targets.register("tokens")
class Tokens:
    """The tokens as they are."""

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens


@targets.register("spatial-norm")
class SpatialNorm:
    """iREPA's spatial normalisation (arXiv 2512.10794): `z = (y - gamma mean(y)) / (std(y) + eps)`.

    Mean and standard deviation (with N - 1) are those of each channel over the tokens of an image. It takes away most
    of what the tokens have in common, so that the comparison is about where they differ. In float32 or better.
    """

    def __init__(self, gamma: float = 0.6, eps: float = 1e-6):
        self.gamma, self.eps = float(gamma), float(eps)

    def __call__(self, tokens: Tensor) -> Tensor:
        tokens = tokens.double() if tokens.itemsize > 4 else tokens.float()
        mean, std = tokens.mean(dim=1, keepdim=True), tokens.std(dim=1, keepdim=True)
        return (tokens - self.gamma * mean) / (std + self.eps)
