"""How training times are drawn: each is a callable (count, generator, path) -> times (count,) in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dic_repa.paths import Path
from dic_repa.registry import Registry

time_samplings = Registry("time sampling")


def create_time_sampling(name: str, **kwargs):
    """The time sampling filed under `name`, made with `kwargs`. Raises UserError for an unknown name."""
    return time_samplings.get(name)(**kwargs)


def _normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator, device=generator.device)


@time_samplings.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """t ~ U(0, 1)."""

    def __call__(self, count: int, generator: torch.Generator, path: Path) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device)


@time_samplings.register("logit-normal")
@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(n), n ~ N(mean, std^2) (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, count: int, generator: torch.Generator, path: Path) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _normal(count, generator))
