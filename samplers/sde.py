"""Sampling by the reverse SDE dx = (v - w/2 s) dt + sqrt(w) dW, from noise at t = 1 to data at t = 0.

Every diffusion coefficient w(t) >= 0 has the same marginals as the ODE (Ma et al. 2024, eq. 6); it trades new noise
against error correction. SiT writes the noise as sqrt(2 w') dW, so that w is twice its form, and counts time the other
way round.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant
from dic_repa.registry import Registry
from dic_repa.samplers.field import Field, SampleInfo, VelocityFn, as_state
from dic_repa.samplers.grids import TimeGrid, UniformGrid
from dic_repa.samplers.noise import StepNoise
from dic_repa.samplers.ode import check_start, check_times
from dic_repa.samplers.solvers import sde_solvers, start_solver

Diffusion = Callable[[float], float]
diffusion_forms = Registry(
    "diffusion form", key="sample.diffusion", functions=True
)  # functions (path, t, norm) -> w(t)
last_steps = Registry("last step", key="sample.last_step", functions=True)  # (sde, x, t) -> x at t = 0


def create_diffusion(form: str | Diffusion, path: Interpolant, norm: float = 1.0) -> Diffusion:
    """w(t) of a `form` of `diffusion_forms`, scaled by `norm`; a callable is taken as it is."""
    if callable(form):
        return form
    if not norm >= 0:
        raise UserError(f"diffusion norm {norm}: give a number of at least 0")
    function = diffusion_forms.find(form)
    return lambda t: function(path, t, norm)


@diffusion_forms.register("constant")
def constant(path: Interpolant, t: float, norm: float) -> float:
    """2 norm: as much noise near the data as elsewhere; with the solver ou and the last step tweedie.

    Stiff near the data, where euler_maruyama wants many steps; the solver ou does not.
    """
    return 2 * norm


@diffusion_forms.register("sbdm")
def sbdm(path: Interpolant, t: float, norm: float) -> float:
    """That of the score-based diffusion with the path's marginals; very large near t = 1.

    2 norm sigma (sigma' - sigma alpha' / alpha).
    """
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return (2 * norm * c.sigma * c.determinant / c.alpha).item()


@diffusion_forms.register("sigma")
def sigma(path: Interpolant, t: float, norm: float) -> float:
    """2 norm sigma(t): like linear, following the path."""
    return 2 * norm * path.coefficients(torch.tensor(t, dtype=torch.float64)).sigma.item()


@diffusion_forms.register("linear")
def linear(path: Interpolant, t: float, norm: float) -> float:
    """2 norm t: least noise near the data; REPA and U-REPA."""
    return 2 * norm * t


@diffusion_forms.register("decreasing")
def decreasing(path: Interpolant, t: float, norm: float) -> float:
    """(1 - norm cos(pi t))^2 / 2: falls smoothly from 2 at the noise to 0 at the data."""
    return 0.5 * (1 - norm * math.cos(math.pi * t)) ** 2


@diffusion_forms.register("increasing-decreasing")
def increasing_decreasing(path: Interpolant, t: float, norm: float) -> float:
    """2 norm sin(pi t)^2: none at either end."""
    return 2 * norm * math.sin(math.pi * t) ** 2


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def decay(w: Diffusion, path: Interpolant, t: float, s: float) -> float:
    """exp(-int_s^t w / (2 sigma^2)) for s < t: the share of the present noise that a step keeps (0 for s = 0).

    The integral is taken in log t, in which it is smooth towards t = 0.
    """
    if s == 0:
        return 0.0
    middle, half = 0.5 * (math.log(t) + math.log(s)), 0.5 * (math.log(t) - math.log(s))
    times = np.exp(middle + half * _NODES)
    sigma = path.coefficients(torch.from_numpy(times)).sigma.numpy()
    rate = np.array([w(float(tau)) for tau in times]) / (2 * sigma**2)
    return math.exp(-half * float(np.sum(_WEIGHTS * rate * times)))


class ReverseSDE:
    """dx = drift(x, t) dt + sqrt(w(t)) dW with drift = v - w/2 s, run from t = 1 to 0."""

    def __init__(self, field: Field, w: Diffusion):
        self.field, self.w = field, w

    def drift(self, x: Tensor, t: float) -> Tensor:
        v = self.field(x, t)
        by_velocity, by_state = self._score(t)
        half = 0.5 * self.w(t)
        return (1 - half * by_velocity) * v - half * by_state * x

    def _score(self, t: float) -> tuple[float, float]:
        """(p, q) with the score p v + q x: two numbers, for which a GPU would need twenty operations a step."""
        v, x = torch.eye(2, dtype=torch.float64)
        p, q = self.field.path.convert(v, x, torch.tensor(t, dtype=torch.float64), "velocity", "score").tolist()
        return p, q

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
    """To the data prediction (x + sigma^2 s) / alpha; take this on a VP path."""
    return sde.field.data(x, t)


@last_steps.register("none")
def no_last_step(sde: ReverseSDE, x: Tensor, t: float) -> Tensor:
    """No last step: the SDE runs as far as its score can be computed, and a trace of noise stays."""
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
    start: float = 1.0,
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
        start: as in `sample_ode`.
        return_info: return a SampleInfo too.

    Returns:
        x (B, ...) in the dtype of `noise`, at least float32.

    Raises:
        UserError: for an unknown solver, form or last step, less than one step, or a last step that is too large.
    """
    step = start_solver(solver, "sde")
    found = last_steps.find(last_step)
    finish = None if found is no_last_step else found
    field = Field(velocity_fn, path)
    sde = ReverseSDE(field, create_diffusion(diffusion, field.path, diffusion_norm))
    noise_fn = noise_fn or StepNoise(seed, range(len(noise)) if indices is None else indices)
    low, high = field.time_range("score")
    if diffusion == "sbdm":
        high = min(high, field.path.safe_interval("noise", "data")[1])
    high = check_start(start, low, high, times)
    if times is not None and not callable(times):
        plan = check_times(times, low, high)
    elif steps is None or steps < 1:
        raise UserError(f"steps={steps}: an SDE solver takes a step count of at least 1")
    elif finish and not 0 < last_step_size < high:
        raise UserError(f"last_step_size={last_step_size}: give a time between 0 and {high:g}, or last_step 'none'")
    else:
        end = max(low, last_step_size) if finish else low
        own = steps - 1 if finish else steps
        plan = (times or UniformGrid())(own, high, end, field.path) if own else [high]

    solver_steps = len(plan) - 1

    def one_step(index: int, x: Tensor, t: float, s: float) -> Tensor:
        if finish and index == solver_steps:
            return finish(sde, x, t)
        return step(sde, x, t, s, noise_fn(index, x).to(x))

    plan = [*plan, 0.0] if finish else plan
    states = field.run(one_step, as_state(noise), plan, every=return_info)
    field.begin_step(None, None)
    return (states[-1], SampleInfo(field.nfe, plan, states)) if return_info else states[-1]
