"""DDPM's objective as ADM, DiT and DiC train it: noise prediction with a learned variance, the hybrid loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from dic_repa.conditions import null_of
from dic_repa.errors import UserError, unknown_name
from dic_repa.interpolants import VPPath
from dic_repa.limits import check_limit
from dic_repa.objectives.base import Denoising, Noisy, VelocityModel, objectives, once, run_denoiser
from dic_repa.samplers.ddpm import BetaSchedule, split_output

_SCHEDULES = {"linear": BetaSchedule.linear, "scaled-linear": BetaSchedule.scaled_linear}


@dataclass(frozen=True)
class DDPMNoisy(Noisy):
    """A corrupted batch; `t` is what the denoiser embeds, the steps 0 ... N - 1 plus the number of the first."""

    data: Tensor  # (B, C, H, W)
    steps: Tensor  # (B,), from 0
    num_steps: int

    @property
    def unit_time(self) -> Tensor:
        return (self.steps + 1) / self.num_steps


@objectives.register("ddpm")
class DDPM(Denoising):
    """|noise prediction - noise|^2 + L_vlb (Nichol and Dhariwal 2021, eq. 16 without its 0.001).

    L_vlb trains the variance alone: its mean is detached. The denoiser gets the step as a float.

    Args:
        learned_variance: False leaves L_vlb out, and the second half of a `learn_sigma` denoiser's channels.
        fixed_variance: of sampling without a learned one: 'large' (DiT's) or 'small'.
        betas: 'linear' or 'scaled-linear'; see `BetaSchedule`.
        first_step: the number of the first step: 0 for DiT and DiC, 1 for U-ViT.
    """

    def __init__(
        self,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        learned_variance: bool = True,
        fixed_variance: str = "large",
        betas: str = "linear",
        first_step: int = 0,
    ):
        check_limit("solver-steps", steps, "the number of ddpm's steps")
        if steps < 2 or not 0 < beta_start <= beta_end < 1:
            raise UserError(
                f"ddpm with {steps} steps and betas from {beta_start} to {beta_end}: "
                "give at least 2 steps and betas that rise within (0, 1)"
            )
        if betas not in _SCHEDULES:
            raise unknown_name("schedule of betas", betas, _SCHEDULES)
        self.schedule = _SCHEDULES[betas](steps, beta_start, beta_end, fixed_variance)
        self.learned_variance, self.first_step = learned_variance, first_step
        # On which `velocity_model` puts the denoiser: the limit of linear betas, with as much noise at its end.
        beta_max = 2 * self.schedule.betas.sum().item() - steps * beta_start
        self.path = VPPath(beta_min=steps * beta_start, beta_max=beta_max)

    trains_middle = False  # the second half of the channels is the variance

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Steps `t` (B,), as floats, and `noise` (B, C, H, W) for a whole step's batch; see `FlowMatching.draw`."""
        steps = torch.randint(len(self.schedule), (shape[0],), generator=generator, device=generator.device)
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
        return {"t": steps.float().to(device), "noise": noise.to(device)}

    def corrupt(self, x: Tensor, t: Tensor, noise: Tensor) -> DDPMNoisy:
        """x_t for data x (B, C, H, W), steps t (B,) and noise (B, C, H, W), which is the target."""
        x_t = self.schedule.noised(x, noise, t.long())
        ones, count = torch.ones_like(t), len(self.schedule)
        return DDPMNoisy(x_t, t + self.first_step, noise, ones, data=x, steps=t, num_steps=count)

    def earlier(self, t: Tensor, interval: Tensor) -> Tensor:
        return (t - (interval * len(self.schedule)).round()).clamp(min=0)

    def loss(self, prediction: Tensor, noisy: DDPMNoisy) -> Tensor:
        """The sum of `terms`, (B,) in float32."""
        squared, bound = self.terms(prediction, noisy)
        return squared + bound

    def terms(self, prediction: Tensor, noisy: DDPMNoisy) -> tuple[Tensor, Tensor]:
        """The squared error of the noise and L_vlb in bits per dimension, each (B,) in float32, for a `prediction`
        (B, 2C, H, W); without a learned variance (B, C, H, W) is enough. Raises UserError otherwise."""
        eps, fraction = split_output(prediction.float(), noisy.target.shape[1])
        squared = reduce((eps - noisy.target.float()).square(), "b ... -> b", "mean")
        if not self.learned_variance:
            return squared, torch.zeros_like(squared)
        if fraction is None:
            raise UserError("ddpm with a learned variance needs twice the channels of the data: set learn_sigma")
        return squared, self._bound(eps.detach(), fraction, noisy)

    def _bound(self, eps: Tensor, fraction: Tensor, noisy: DDPMNoisy) -> Tensor:
        """KL(q(x_(t-1) | x_t, x) || p) in bits per dimension, and -log p(x | x_0) at the first step."""
        data, x, i = noisy.data.float(), noisy.x_t.float(), noisy.steps.long()
        mean = self.schedule.posterior_mean(self.schedule.data(x, eps, i), x, i)
        log_variance = self.schedule.log_variance(fraction, x, i)
        true_mean = self.schedule.posterior_mean(data, x, i)
        true_log_variance = self.schedule.log_posterior_variance(x, i)
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean).square() * torch.exp(-log_variance)
            - 1
        )
        decoder = discretized_gaussian_nll(data, mean, 0.5 * log_variance)
        decoder, divergence = (reduce(nats, "b ... -> b", "mean") for nats in (decoder, divergence))
        return torch.where(i == 0, decoder, divergence) / math.log(2)

    def velocity_model(self, denoiser) -> DDPMVelocityModel:
        """The denoiser as a velocity on the VP path, for the ODE and SDE samplers."""
        return DDPMVelocityModel(denoiser, self.path, self.schedule, self.first_step)

    def noise_model(self, denoiser) -> DDPMNoiseModel:
        """The denoiser as (x, t (B,) in (0, 1], y) -> (B, C or 2C, H, W), for `sample_ddpm`."""
        return DDPMNoiseModel(denoiser, self.path, len(self.schedule), self.first_step)


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log of a Gaussian's mass in the bin of x, for 8-bit values in [-1, 1] (Ho et al. 2020, eq. 13), like x, with
    ADM's approximation of the normal distribution function, so that the numbers compare."""
    inverse = torch.exp(-log_scale)
    above = _normal_cdf(inverse * (x - mean + 1 / 255))
    below = _normal_cdf(inverse * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class DDPMNoiseModel:
    """A denoiser that embeds steps as (x, t, y) -> output, step i of N being the time t = (i + 1) / N."""

    def __init__(self, denoiser, path: VPPath, num_steps: int, first_step: int = 0):
        self.denoiser, self.path, self.num_steps, self.first_step = denoiser, path, num_steps, first_step
        self.null = null_of(denoiser)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        step = once(lambda t: torch.round(t.double() * self.num_steps) - 1 + self.first_step, t)
        return run_denoiser(self.denoiser, x, step, y)


class DDPMVelocityModel(VelocityModel):
    """A denoiser that embeds steps as a velocity on the continuous VP path: at a time t it is evaluated at the
    (fractional) step whose ratio of noise to data is the path's at t."""

    def __init__(self, denoiser, path: VPPath, schedule: BetaSchedule, first_step: int = 0):
        super().__init__(denoiser, path, "noise")
        self.first_step = first_step
        self.log_ratios = 0.5 * torch.log((1 - schedule.alpha_bar) / schedule.alpha_bar)

    def embedded_time(self, t: Tensor) -> Tensor:
        c = self.path.coefficients(t.double())
        self.log_ratios = known = self.log_ratios.to(t.device)
        log_ratio = torch.log(c.sigma / c.alpha).clamp(known[0], known[-1])
        right = torch.searchsorted(known, log_ratio).clamp(1, len(known) - 1)
        step = right - (known[right] - log_ratio) / (known[right] - known[right - 1])
        return step + self.first_step
