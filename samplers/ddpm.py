"""DDPM (also ADM, DiT, DiC): the discrete noise schedule, and ancestral sampling and DDIM of a noise predictor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, repeat

import torch
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.interpolants import expand_as
from dic_repa.samplers.field import Field, SampleInfo, as_state
from dic_repa.samplers.noise import StepNoise
from dic_repa.samplers.solvers import ddpm_solvers, start_solver

Index = int | Tensor  # a step, or one step for each row (B,)
VARIANCES = ("large", "small")


class BetaSchedule:
    """x_i = sqrt(abar_i) x + sqrt(1 - abar_i) eps at the steps i = 0 ... N - 1, with abar the product of 1 - beta.

    `times[i]` is the time of step i in (0, 1]: (its number in the original schedule + 1) / (the original's steps).
    `fixed_variance` is that of a model that learns none: 'large', beta, as in DiT and ADM; 'small', the posterior's.
    Methods take a step as an int, or one for each row as a tensor (B,).
    """

    def __init__(self, betas: Tensor, times: list[float] | None = None, fixed_variance: str = "large"):
        if fixed_variance not in VARIANCES:
            raise unknown_name("fixed variance", fixed_variance, VARIANCES)
        self.betas, self.fixed_variance = betas.double(), fixed_variance
        self.times = times or [(i + 1) / len(betas) for i in range(len(betas))]
        self.alpha_bar = torch.cumprod(1 - self.betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        posterior = self.betas * (1 - before) / (1 - self.alpha_bar)
        # The first step's posterior has no variance; its logarithm is taken to be the second step's.
        posterior = torch.cat([posterior[1:2] if len(betas) > 1 else self.betas, posterior[1:]])
        self._tables = {
            "alpha": self.alpha_bar.sqrt(),
            "sigma": (1 - self.alpha_bar).sqrt(),
            "alpha_before": before.sqrt(),
            "sigma_before": (1 - before).sqrt(),
            "of_data": self.betas * before.sqrt() / (1 - self.alpha_bar),
            "of_state": (1 - before) * (1 - self.betas).sqrt() / (1 - self.alpha_bar),
            "log_beta": self.betas.log(),
            "log_posterior": posterior.log(),
            # Beta, but for the first step: with it the data would be less likely than they need be.
            "log_large": torch.cat([posterior[:1], self.betas[1:]]).log(),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    @classmethod
    def linear(
        cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02, fixed_variance: str = "large"
    ) -> BetaSchedule:
        """Betas that rise linearly (Ho et al. 2020; ADM, DiT and DiC)."""
        return cls(torch.linspace(start, end, steps, dtype=torch.float64), fixed_variance=fixed_variance)

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012, fixed_variance: str = "large"
    ) -> BetaSchedule:
        """Betas whose roots rise linearly (Rombach et al. 2022; Stable Diffusion, U-ViT-H)."""
        roots = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64)
        return cls(roots.square(), fixed_variance=fixed_variance)

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, name: str, i: Index, x: Tensor) -> Tensor | float:
        """The coefficient `name` at step `i`, to multiply x (B, ...) with."""
        if isinstance(i, int):
            return self._tables[name][i].item()
        if x.device not in self._on_device:
            self._on_device[x.device] = {key: table.float().to(x.device) for key, table in self._tables.items()}
        return expand_as(self._on_device[x.device][name][i], x)

    def noised(self, data: Tensor, noise: Tensor, i: Index) -> Tensor:
        """x_i."""
        return self.at("alpha", i, data) * data + self.at("sigma", i, data) * noise

    def data(self, x: Tensor, noise: Tensor, i: Index) -> Tensor:
        """The data prediction (x_i - sigma_i noise) / alpha_i."""
        return (x - self.at("sigma", i, x) * noise) / self.at("alpha", i, x)

    def posterior_mean(self, data: Tensor, x: Tensor, i: Index) -> Tensor:
        """The mean of q(x_(i-1) | x_i, data) (Ho et al. 2020, eq. 7)."""
        return self.at("of_data", i, x) * data + self.at("of_state", i, x) * x

    def log_posterior_variance(self, x: Tensor, i: Index) -> Tensor:
        """The log variance of q(x_(i-1) | x_i, data), like x."""
        return torch.ones_like(x) * self.at("log_posterior", i, x)

    def log_variance(self, fraction: Tensor | None, x: Tensor, i: Index) -> Tensor:
        """The log variance of the model's step: between the posterior's, where `fraction` is -1, and log beta, where it
        is 1 (Nichol and Dhariwal 2021, eq. 15); without a fraction, `fixed_variance`."""
        if fraction is None and self.fixed_variance == "large":
            return torch.ones_like(x) * self.at("log_large", i, x)
        low = self.log_posterior_variance(x, i)
        if fraction is None:
            return low
        share = 0.5 * (fraction + 1)
        return share * self.at("log_beta", i, x) + (1 - share) * low

    def respaced(self, steps: int, strided: bool = False) -> BetaSchedule:
        """The schedule over `steps` of these steps: evenly from the first to the last, or every k-th from the first.

        They are exactly ADM's and DiT's; one step alone is the first. Raises UserError for a count that is out of
        range or, strided, for which there is no whole stride.
        """
        count = len(self)
        if steps is None or not 1 <= steps <= count:
            raise UserError(f"steps={steps}: a schedule of {count} steps is respaced to between 1 and {count}")
        if strided:
            strides = {len(range(0, count, stride)): stride for stride in range(count, 0, -1)}
            if steps not in strides:
                near = sorted(sorted(strides, key=lambda known: abs(known - steps))[:2])
                raise UserError(f"no whole stride takes {steps} of {count} steps; near are {near[0]} and {near[1]}")
            kept = list(range(0, count, strides[steps]))
        else:
            stride = (count - 1) / max(steps - 1, 1)
            kept = [round(i) for i in accumulate(repeat(stride, steps - 1), initial=0.0)]
        alpha_bar = self.alpha_bar[kept]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return BetaSchedule(1 - alpha_bar / before, [self.times[i] for i in kept], self.fixed_variance)


@ddpm_solvers.register("ddpm", order=1, evaluations=1, deterministic=False)
class Ancestral:
    """Ancestral sampling of a noise predictor; DiT and DiC: 250 steps."""

    def __call__(
        self, schedule: BetaSchedule, x: Tensor, data: Tensor, fraction: Tensor | None, i: int
    ) -> tuple[Tensor, Tensor | float]:
        return schedule.posterior_mean(data, x, i), torch.exp(0.5 * schedule.log_variance(fraction, x, i))


@ddpm_solvers.register("ddim", order=1, evaluations=1, deterministic=True)
class DDIM:
    """Deterministic sampling of a noise predictor over fewer steps."""

    strided = True  # its steps are every n-th of the schedule's

    def __init__(self, eta: float = 0.0):
        if not 0 <= eta <= 1:
            raise UserError(f"eta={eta}: give a share between 0 (deterministic) and 1")
        self.eta = eta

    def __call__(
        self, schedule: BetaSchedule, x: Tensor, data: Tensor, fraction: Tensor | None, i: int
    ) -> tuple[Tensor, Tensor | float]:
        names = ("alpha", "sigma", "alpha_before", "sigma_before")
        alpha, sigma, alpha_before, sigma_before = (schedule.at(name, i, x) for name in names)
        shrink = alpha / alpha_before
        deviation = self.eta * sigma_before / sigma * (1 - shrink**2) ** 0.5
        eps = (x - alpha * data) / sigma  # not the prediction itself, which clipping has changed
        return alpha_before * data + max(sigma_before**2 - deviation**2, 0.0) ** 0.5 * eps, deviation


@torch.no_grad()
def sample_ddpm(
    model_fn: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    solver: str = "ddpm",
    steps: int = 250,
    noise_fn: Callable[[int, Tensor], Tensor] | None = None,
    *,
    schedule: BetaSchedule | None = None,
    eta: float | None = None,
    clip: bool = False,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SampleInfo]:
    """From `noise` (B, C, ...) to data over `steps` respaced steps of `schedule` (by default 1000 linear betas).

    `model_fn` (x, t (B,)) -> (B, C or 2C, ...) predicts the noise and, if it has 2C channels, how far the log variance
    lies between that of the posterior (-1) and beta (1); without them it is the schedule's. Step i of N has the time
    t = (i + 1) / N, as for guidance intervals elsewhere: `DDPM.noise_model` makes such a model of a denoiser.

    'ddpm' draws from N(mean, variance) of each step, but for the last one, which gives its mean (Ho et al. 2020;
    Nichol and Dhariwal 2021). 'ddim' is x_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) eps + d z with d = `eta` (0 by
    default) times the posterior's deviation (Song et al. 2021, eq. 12); 'ddpm' takes none. `clip` limits x0 to [-1, 1].
    `noise_fn`, `seed`, `indices` and the result as in `sample_sde`.

    Raises:
        UserError: for an unknown solver, a wrong `eta`, other output channels, and steps that the schedule cannot have.
    """
    solve = start_solver(solver, "ddpm", **({} if eta is None else {"eta": eta}))
    respaced = (schedule or BetaSchedule.linear()).respaced(steps, strided=getattr(solve, "strided", False))
    noise_fn = noise_fn or StepNoise(seed, range(len(noise)) if indices is None else indices)
    field = Field(model_fn)

    def step(index: int, x: Tensor, t: float, _s: float) -> Tensor:
        i = steps - 1 - index
        eps, fraction = split_output(field(x, t), x.shape[1])
        data = respaced.data(x, eps, i)
        x, deviation = solve(respaced, x, data.clamp(-1, 1) if clip else data, fraction, i)
        noisy = i > 0 and not (isinstance(deviation, float) and deviation == 0)
        return x + deviation * noise_fn(index, x) if noisy else x

    times = [*respaced.times[::-1], 0.0]
    states = field.run(step, as_state(noise), times, every=return_info)
    field.begin_step(None, None)
    return (states[-1], SampleInfo(field.nfe, times, states)) if return_info else states[-1]


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A denoiser's output as its prediction (B, C, ...) and, with `learn_sigma`, the variance (else None).

    A UserError if it has neither C nor 2C channels."""
    if output.shape[1] == 2 * channels:
        return output[:, :channels], output[:, channels:]
    if output.shape[1] == channels:
        return output, None
    raise UserError(
        f"the denoiser gives {output.shape[1]} channels for {channels} of data: "
        f"build it with {channels} output channels, or {2 * channels} with learn_sigma"
    )
