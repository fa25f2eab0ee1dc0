"""Flow matching: regression on a path's velocity (or noise, score, data) at random times.

A time sampling is a callable (count, generator, path) -> times (count,) in [0, 1]; a loss weighting, a callable (path,
t (B,), prediction) -> weights (B,) of the squared error. A weighting is defined on the error of one quantity, its
`unit`; the error of another prediction is converted to that quantity. A `unit` of None is the prediction itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import reduce
from torch import Tensor

from dic_repa.interpolants import Interpolant, check_prediction, paths
from dic_repa.objectives.base import Denoising, Noisy, VelocityModel, objectives
from dic_repa.registry import Registry
from dic_repa.samplers.ddpm import split_output
from dic_repa.samplers.grids import check_shift, shift_for, shift_time

time_samplings = Registry("time sampling", key="objective.options.time")
weightings = Registry("loss weighting", key="objective.options.weighting")


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
    """The squared error after conversion to noise; for a score, sigma^2 times its own: SiT's unweighted loss."""

    unit: ClassVar[str | None] = "noise"

    def __call__(self, path: Interpolant, t: Tensor, prediction: str) -> Tensor:
        return path.jacobian(t, prediction, self.unit or prediction).square()


@weightings.register("velocity")
@dataclass(frozen=True)
class VelocityWeighting(NoiseWeighting):
    """The squared error after conversion to a velocity."""

    unit: ClassVar[str | None] = "velocity"


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


@objectives.register("flow-matching")
class FlowMatching(Denoising):
    """E_t w(t) |prediction(x_t, t) - target|^2 with x_t = alpha(t) x + sigma(t) noise (Lipman et al. 2023; SiT).

    Args:
        path: 'linear', 'cosine' or 'vp'.
        time: how t is drawn: 'uniform', 'logit-normal' or 'log-normal' (both with mean and std).
        prediction: what the denoiser gives: 'velocity', 'noise', 'score' or 'data'.
        weighting: w: 'none', 'noise', 'velocity', 'likelihood' or 'min-snr-gamma' (gamma).
        shift: multiplies t / (1 - t) of every drawn time; 'auto': by what the data's numbers want, `resolution_shift`.

    `path`, `time` and `weighting` are names, mappings of `name` and arguments, or objects. Raises UserError for unknown
    names and a shift that is not positive.
    """

    def __init__(
        self,
        path: Interpolant | str | dict = "linear",
        time="uniform",
        prediction: str = "velocity",
        weighting="none",
        shift: float | str = 1.0,
    ):
        self.path = paths.create(path)
        self.time = time_samplings.create(time)
        self.prediction = check_prediction(prediction)
        self.weighting = weightings.create(weighting)
        self.shift = check_shift(shift)
        ranges = [self.path.safe_interval(prediction, unit) for unit in (prediction, self.weighting.unit or prediction)]
        if self.weighting.unit:
            ranges.append(self.path.safe_interval("noise", "velocity"))  # weights may divide by alpha themselves
        self.time_range = max(low for low, _ in ranges), min(high for _, high in ranges)

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Times `t` (B,) and `noise` (B, C, H, W) for a whole step's batch of `shape` (B, C, H, W).

        Drawn in float32 where the generator lives, then moved, so that a CPU generator gives every device the same.
        Times are drawn within the range where the target and its weight are finite.
        """
        t = self.draw_times(shape, generator)
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
        return {"t": t.to(device), "noise": noise.to(device)}

    def draw_times(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Times (B,) for a batch of `shape` (B, C, H, W), on the generator's device, within the range."""
        shift = shift_for(math.prod(shape[1:]), self.shift)
        return shift_time(self.time(shape[0], generator, self.path), shift).clamp(*self.time_range)

    def corrupt(self, x: Tensor, t: Tensor, noise: Tensor) -> Noisy:
        """x_t, the target and its weight for data x (B, C, H, W), times t (B,) and noise (B, C, H, W)."""
        target = self.path.target(x, noise, t, self.prediction)
        weight = self.weighting(self.path, t, self.prediction)
        return Noisy(self.path.sample(x, noise, t).x_t, t, target, weight)

    def earlier(self, t: Tensor, interval: Tensor) -> Tensor:
        return (t - interval).clamp(min=self.time_range[0])

    def loss(self, prediction: Tensor, noisy: Noisy) -> Tensor:
        """The weighted mean squared error of each image, (B,) in float32, for a prediction (B, C, H, W).

        With the 2C channels of `learn_sigma`, the first C count; other numbers of channels are a UserError."""
        target = noisy.target.float()
        error = split_output(prediction, target.shape[1])[0].float() - target
        return noisy.weight * reduce(error.square(), "b ... -> b", "mean")

    def velocity_model(self, denoiser) -> VelocityModel:
        """The denoiser as a velocity (x, t, y) -> (B, C, H, W), which the samplers take."""
        return VelocityModel(denoiser, self.path, self.prediction)
