"""Sampling by the reverse SDE dx = (v - w/2 s) dt + sqrt(w) dW, from noise at t = 1 to data at t = 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant
from dic_repa.registry import Registry
from dic_repa.samplers.diffusion_coefficients import Diffusion, create_diffusion, decay
from dic_repa.samplers.field import Field, VelocityFn, as_state
from dic_repa.samplers.grids import TimeGrid, UniformGrid
from dic_repa.samplers.noise import StepNoise
from dic_repa.samplers.ode import SampleInfo, check_times
from dic_repa.samplers.solvers import sde_solvers, solver_info, start_solver

last_steps = Registry("last step", key="sample.last_step")  # functions (sde, x, t) -> x at t = 0


class ReverseSDE:
    """dx = drift(x, t) dt + sqrt(w(t)) dW with drift = v - w/2 s, run from t = 1 to 0."""

    def __init__(self, field: Field, w: Diffusion):
        self.field, self.w = field, w

    def drift(self, x: Tensor, t: float) -> Tensor:
        v = self.field(x, t)
        return v - 0.5 * self.w(t) * self.field.convert(v, x, t, "score")

    def noise(self, x: Tensor, t: float, s: float, z: Tensor) -> Tensor:
        """The noise of a step from t to s < t, with w taken at its start."""
        return (self.w(t) * (t - s)) ** 0.5 * z


@sde_solvers.register("euler_maruyama", order=1, evaluations=1)
def euler_maruyama(sde: ReverseSDE, x: Tensor, t: float, s: float, z: Tensor) -> Tensor:
    """What SiT, REPA and U-REPA report: 250 steps."""
    return x + (s - t) * sde.drift(x, t) + sde.noise(x, t, s, z)


@sde_solvers.register("stochastic_heun", order=2, evaluations=2)
def stochastic_heun(sde: ReverseSDE, x: Tensor, t: float, s: float, z: Tensor) -> Tensor:
    """A corrected euler_maruyama, of second order; not for a diffusion that is large near the data.

    The trapezoidal rule for the drift, behind an Euler-Maruyama step with the same noise. It is of weak order 2, as the
    noise does not depend on the state; w counts with the mean of its roots at the step's ends.
    """
    noise = 0.5 * ((sde.w(t) * (t - s)) ** 0.5 + (sde.w(s) * (t - s)) ** 0.5) * z
    drift = sde.drift(x, t)
    end = x + (s - t) * drift + noise
    return x + 0.5 * (s - t) * (drift + sde.drift(end, s)) + noise


@sde_solvers.register("heun-sit", order=1, evaluations=2)
def heun_sit(sde: ReverseSDE, x: Tensor, t: float, s: float, z: Tensor) -> Tensor:
    """SiT's Heun: a step's noise first, then heun; for its numbers, stochastic_heun is more accurate."""
    noisy = x + sde.noise(x, t, s, z)
    drift = sde.drift(noisy, t)
    return noisy + 0.5 * (s - t) * (drift + sde.drift(noisy + (s - t) * drift, s))


@sde_solvers.register("ou", order=1, evaluations=1)
def ornstein_uhlenbeck(sde: ReverseSDE, x: Tensor, t: float, s: float, z: Tensor) -> Tensor:
    """Exact for a frozen data prediction; stable where the diffusion is large near the data.

    The SDE solved exactly for a data prediction D that stays what it is at the step's start.

    x - alpha D is an Ornstein-Uhlenbeck process then, and x_s = alpha_s D + sigma_s (k eps + sqrt(1 - k^2) z) with
    k = exp(-int_s^t w / (2 sigma^2)). With no diffusion this is DDIM, with the form 'sbdm' DDPM's ancestral step.
    """
    v = sde.field(x, t)
    data, noise = (sde.field.convert(v, x, t, target) for target in ("data", "noise"))
    c = sde.field.path.coefficients(torch.tensor(s, dtype=torch.float64))
    keep = decay(sde.w, sde.field.path, t, s)
    return c.alpha.item() * data + c.sigma.item() * (keep * noise + (1 - keep**2) ** 0.5 * z)


@last_steps.register("mean")
def mean(sde: ReverseSDE, x: Tensor, t: float) -> Tensor:
    """Along the SDE's drift, without noise; REPA and U-REPA."""
    return x - t * sde.drift(x, t)


@last_steps.register("euler")
def euler(sde: ReverseSDE, x: Tensor, t: float) -> Tensor:
    """Along the ODE's velocity."""
    return x - t * sde.field(x, t)


@last_steps.register("tweedie")
def tweedie(sde: ReverseSDE, x: Tensor, t: float) -> Tensor:
    """To the data prediction (x + sigma^2 s) / alpha; the one to take on a VP path."""
    return sde.field.data(x, t)


@last_steps.register("none")
def no_last_step(sde: ReverseSDE, x: Tensor, t: float) -> Tensor:
    """No last step: the SDE runs on to where its score can still be computed, and a trace of noise stays."""
    return x


@torch.no_grad()
def sample_sde(
    velocity_fn: VelocityFn,
    noise: Tensor,
    path: Interpolant | None = None,
    solver: str = "euler_maruyama",
    steps: int = 250,
    noise_fn: Callable[[int, Tensor], Tensor] | None = None,
    last_step_size: float = 0.04,
    *,
    diffusion: str | Diffusion = "linear",
    diffusion_norm: float = 1.0,
    last_step: str = "mean",
    times: TimeGrid | Sequence[float] | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SampleInfo]:
    """Integrate from `noise` (B, ...) at t = 1 to data at t = 0 by the SDE whose diffusion w(t) is `diffusion`.

    Args:
        path: as in `sample_ode`.
        steps: all steps: steps - 1 of the solver from 1 to `last_step_size`, then the `last_step`.
        noise_fn: gives the standard normal noise of a step, (step, like) -> like; by default it depends on (`seed`,
            the sample's index among `indices`, step) only. `indices` are 0 to B - 1 by default.
        last_step: 'mean', 'tweedie' or 'euler'; with 'none' the solver's steps end where there still is a score.
        times: a grid for the steps, uniform by default; or the times themselves, which replace `steps` and
            `last_step_size`: the last time is the size of the last step.
        return_info: return a SampleInfo too.

    Returns:
        x (B, ...) in the dtype of `noise`, at least float32.

    Raises:
        UserError: for an unknown solver, form or last step, less than one step, or a last step that is too large.
    """
    solver_info(solver, "sde")
    step = start_solver(solver, "sde")
    found = last_steps.find(last_step)
    finish = None if found is no_last_step else found
    field = Field(velocity_fn, path)
    sde = ReverseSDE(field, create_diffusion(diffusion, field.path, diffusion_norm))
    noise_fn = noise_fn or StepNoise(seed, range(len(noise)) if indices is None else indices)
    low, high = field.time_range("score")
    if diffusion == "sbdm":
        high = min(high, field.path.safe_interval("noise", "data")[1])
    if times is None or callable(times):
        solver_steps = _check_steps(steps, last_step_size, high, finish is not None)
        end = max(low, last_step_size) if finish else low
        plan = (times or UniformGrid())(solver_steps, high, end, field.path) if solver_steps else [high]
    else:
        plan = check_times(times, low, high)

    x = as_state(noise)
    states = [x]
    for index, (t, s) in enumerate(pairwise(plan)):
        field.begin_step(t, s)
        x = step(sde, x, t, s, noise_fn(index, x).to(x))
        if return_info:
            states.append(x)
    if finish is not None:
        field.begin_step(plan[-1], 0.0)
        x = finish(sde, x, plan[-1])
        plan, states = [*plan, 0.0], [*states, x]
    field.begin_step(None, None)
    return (x, SampleInfo(field.nfe, plan, states)) if return_info else x


def _check_steps(steps: int, last_step_size: float, high: float, has_last: bool) -> int:
    """How many of the `steps` are the solver's own."""
    if steps is None or steps < 1:
        raise UserError(f"steps={steps}: an SDE solver takes a step count of at least 1")
    if has_last and not 0 < last_step_size < high:
        raise UserError(f"last_step_size={last_step_size}: give a time between 0 and {high:g}, or the last step 'none'")
    return steps - has_last
