"""Where the steps of a sampler are: a grid is a callable (steps, high, low, path) -> steps + 1 times that fall from
high to low, both included."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant
from dic_repa.registry import Registry

TimeGrid = Callable[[int, float, float, Interpolant], list[float]]
time_grids = Registry("time grid", key="sample.grid.name")
AUTO = "auto"  # a shift by the data's size


def shift_time(t: Any, shift: float) -> Any:
    """t' = shift t / (1 + (shift - 1) t), of a number or a tensor: t / (1 - t) is multiplied by the shift."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(dimensions: int, base: int = 4096) -> float:
    """sqrt(dimensions / base): the shift for data of so many numbers, if data of `base` need none. The same noise hides
    less of larger data (Esser et al. 2024, eq. 23; RAE, arXiv 2510.11690, has the same base, 4x32x32 latents)."""
    return (dimensions / base) ** 0.5


def check_shift(shift: float | str) -> float | str:
    """The shift, if it is a number above 0 or `AUTO`; otherwise a UserError."""
    if shift != AUTO and (isinstance(shift, str) or not shift > 0):
        raise UserError(f"shift {shift}: give a number above 0 (1 shifts nothing), or '{AUTO}'")
    return shift


def shift_for(dimensions: int, shift: float | str) -> float:
    """The shift as a number, for data of so many numbers."""
    return resolution_shift(dimensions) if isinstance(shift, str) else shift


@time_grids.register("uniform")
@dataclass(frozen=True)
class UniformGrid:
    """Equal steps in t."""

    def __call__(self, steps: int, high: float, low: float, path: Interpolant) -> list[float]:
        return torch.linspace(high, low, steps + 1, dtype=torch.float64).tolist()


@time_grids.register("shifted")
@dataclass(frozen=True)
class ShiftedGrid:
    """t / (1 - t) times a shift: above 1, more steps at high noise, for larger latents.

    Equal steps, each time t moved to shift t / (1 + (shift - 1) t); larger latents take shift = sqrt(dimensions / base)
    (Esser et al. 2024, eq. 23), which 'auto' is where the data's size is known: in recipes, `dic-repa sample` and a
    loaded model.
    """

    shift: float | str = 3.0

    def __post_init__(self):
        check_shift(self.shift)

    def of(self, dimensions: int) -> "ShiftedGrid":
        """The grid for data of so many numbers."""
        return ShiftedGrid(shift_for(dimensions, self.shift))

    def __call__(self, steps: int, high: float, low: float, path: Interpolant) -> list[float]:
        if isinstance(self.shift, str):
            raise UserError(f"shift {AUTO} needs the data's size: take ShiftedGrid(resolution_shift(dimensions))")
        return [low + (high - low) * shift_time(t, self.shift) for t in UniformGrid()(steps, 1.0, 0.0, path)]


@time_grids.register("karras")
@dataclass(frozen=True)
class KarrasGrid:
    """Equal steps in a root of the ratio of noise to data: more steps at low noise (EDM).

    Equal in (sigma / alpha)^(1/rho) between two ratios (Karras et al. 2022, eq. 5); it ends at high and low.
    """

    rho: float = 7.0
    ratio_min: float = 0.002
    ratio_max: float = 80.0

    def __post_init__(self):
        if not (self.rho > 0 and 0 < self.ratio_min < self.ratio_max):
            raise UserError(
                f"karras grid of rho {self.rho} from ratio {self.ratio_max} to {self.ratio_min}: "
                "give rho > 0 and 0 < ratio_min < ratio_max"
            )

    def __call__(self, steps: int, high: float, low: float, path: Interpolant) -> list[float]:
        ends = path.coefficients(torch.tensor([high, low], dtype=torch.float64))
        first, last = (ends.sigma / ends.alpha).clamp(self.ratio_min, self.ratio_max) ** (1 / self.rho)
        ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        times = path.time_at_ratio((first + ramp * (last - first)) ** self.rho).tolist()
        return [high, *times[1:-1], low]
