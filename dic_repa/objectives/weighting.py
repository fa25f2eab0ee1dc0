"""How the squared error of a prediction counts: a weighting is a callable (path, t (B,), prediction) -> weights (B,).

A weighting is defined on the error of one quantity, its `unit`; the error of another prediction counts by what it is in
that quantity. A `unit` of None stands for the prediction itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dic_repa.interpolants import Interpolant
from dic_repa.registry import Registry

weightings = Registry("loss weighting", key="objective.options.weighting")


@weightings.register("none")
@dataclass(frozen=True)
class NoWeighting:
    """1, whatever is predicted."""

    unit: ClassVar[str | None] = None

    def __call__(self, path: Interpolant, t: Tensor, prediction: str) -> Tensor:
        return torch.ones_like(t)


@weightings.register("noise")
@dataclass(frozen=True)
class NoiseWeighting:
    """The squared error of the noise that the prediction amounts to: of a score, sigma^2 times its own, as SiT's code
    trains it where it is asked for no weighting."""

    unit: ClassVar[str | None] = "noise"

    def __call__(self, path: Interpolant, t: Tensor, prediction: str) -> Tensor:
        return path.jacobian(t, prediction, "noise").square()


@weightings.register("velocity")
@dataclass(frozen=True)
class VelocityWeighting:
    """The squared error of the velocity that the prediction amounts to."""

    unit: ClassVar[str | None] = "velocity"

    def __call__(self, path: Interpolant, t: Tensor, prediction: str) -> Tensor:
        return path.jacobian(t, prediction, "velocity").square()


@weightings.register("likelihood")
@dataclass(frozen=True)
class LikelihoodWeighting:
    """g^2 / 2 times the squared error of the score, with g^2 = 2 sigma D / alpha: the bound on the likelihood of the
    diffusion that has the path's marginals (Song et al. 2021, eq. 7; SiT)."""

    unit: ClassVar[str | None] = "score"

    def __call__(self, path: Interpolant, t: Tensor, prediction: str) -> Tensor:
        c = path.coefficients(t)
        return c.sigma * c.determinant / c.alpha * path.jacobian(t, prediction, "score").square()


@weightings.register("min-snr-gamma")
@dataclass(frozen=True)
class MinSNRGamma:
    """min(alpha^2 / sigma^2, gamma) times the squared error of the data (Hang et al. 2023)."""

    gamma: float = 5.0
    unit: ClassVar[str | None] = "data"

    def __call__(self, path: Interpolant, t: Tensor, prediction: str) -> Tensor:
        c = path.coefficients(t)
        snr = (c.alpha / c.sigma).square()
        return snr.clamp(max=self.gamma) * path.jacobian(t, prediction, "data").square()
