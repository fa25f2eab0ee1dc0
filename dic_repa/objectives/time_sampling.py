"""How training times are drawn: each is a callable (count, generator, path) -> times (count,) in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dic_repa.interpolants import Interpolant
from dic_repa.registry import Registry

time_samplings = Registry("time sampling", key="objective.options.time")


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = shift t / (1 + (shift - 1) t): times for larger latents, which lose less of their content to the same noise.

    `resolution_shift` gives the `shift` (Esser et al. 2024, eq. 23).
    """
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(dimensions: int, base: int = 4 * 32 * 32) -> float:
    """sqrt(dimensions / base), for latents of so many numbers where no shift was needed for `base` of them."""
    return (dimensions / base) ** 0.5


def _normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator, device=generator.device)


@time_samplings.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """t ~ U(0, 1)."""

    def __call__(self, count: int, generator: torch.Generator, path: Interpolant) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device)


@time_samplings.register("logit-normal")
@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(n), n ~ N(mean, std^2) (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, count: int, generator: torch.Generator, path: Interpolant) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _normal(count, generator))


@time_samplings.register("log-normal")
@dataclass(frozen=True)
class LogNormal:
    """The time at which sigma / alpha = exp(n), n ~ N(mean, std^2) (REPA's 'lognormal', after Karras et al. 2022)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, count: int, generator: torch.Generator, path: Interpolant) -> Tensor:
        return path.time_at_ratio(torch.exp(self.mean + self.std * _normal(count, generator)))
