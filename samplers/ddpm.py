"""Ancestral sampling and DDIM for a noise predictor that was trained on discrete steps (DDPM, ADM, DiT, DiC)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.samplers.beta_schedule import BetaSchedule
from dic_repa.samplers.field import Field, as_state
from dic_repa.samplers.noise import StepNoise
from dic_repa.samplers.ode import SampleInfo
from dic_repa.samplers.solvers import ddpm_solvers, solver_info, start_solver


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

    `model_fn` (x, t (B,)) -> (B, C or 2C, ...) predicts the noise and, where it has 2C channels, how far the log
    variance lies between that of the posterior (-1) and beta (1); without them it is the schedule's. Step i of N has
    the time t = (i + 1) / N, so that guidance intervals mean what they mean elsewhere: bind what `DDPM.noise_model`
    makes of a denoiser.

    'ddpm' draws from N(mean, variance) of each step, but for the last one, which gives its mean (Ho et al. 2020;
    Nichol and Dhariwal 2021). 'ddim' is x_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) eps + d z with d = `eta` (0 by
    default) times the posterior's deviation (Song et al. 2021, eq. 12); 'ddpm' takes none. `clip` limits x0 to [-1, 1].
    `noise_fn`, `seed`, `indices` and the result as in `sample_sde`.

    Raises:
        UserError: for an unknown solver, a wrong `eta`, other output channels, and steps that the schedule cannot have.
    """
    solver_info(solver, "ddpm")
    method = ddpm_solvers.find(solver)
    if eta is not None and "eta" not in inspect.signature(method).parameters:
        raise UserError(f"'eta' is for ddim; '{solver}' adds its own noise")
    step = start_solver(solver, "ddpm", **({} if eta is None else {"eta": eta}))
    schedule = (schedule or BetaSchedule.linear()).respaced(steps, strided=getattr(method, "strided", False))
    noise_fn = noise_fn or StepNoise(seed, range(len(noise)) if indices is None else indices)
    field = Field(model_fn)
    times = [0.0, *schedule.times]
    x = as_state(noise)
    states = [x]
    for index, i in enumerate(reversed(range(steps))):
        t, s = times[i + 1], times[i]
        field.begin_step(t, s)
        eps, fraction = split_output(field(x, t), x.shape[1])
        data = schedule.data(x, eps, i)
        data = data.clamp(-1, 1) if clip else data
        x, deviation = step(schedule, x, data, fraction, i)
        if i > 0 and not (isinstance(deviation, float) and deviation == 0):
            x = x + deviation * noise_fn(index, x)
        if return_info:
            states.append(x)
    field.begin_step(None, None)
    return (x, SampleInfo(field.nfe, times[::-1], states)) if return_info else x


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A denoiser's output as its prediction (B, C, ...) and, with `learn_sigma`, the variance (else None).

    Raises:
        UserError: for an output that has neither C nor 2C channels.
    """
    if output.shape[1] == 2 * channels:
        return output[:, :channels], output[:, channels:]
    if output.shape[1] == channels:
        return output, None
    raise UserError(
        f"the denoiser gives {output.shape[1]} channels for {channels} of data: "
        f"build it with {channels} output channels, or {2 * channels} with learn_sigma"
    )
