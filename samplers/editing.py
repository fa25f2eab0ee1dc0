"""From given data instead of noise: the way between two noises, a middle time, and data of which a part is known."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant
from dic_repa.samplers.field import Field, SampleInfo, VelocityFn, as_state
from dic_repa.samplers.grids import TimeGrid
from dic_repa.samplers.noise import StepNoise
from dic_repa.samplers.ode import plan_times, sample_ode
from dic_repa.samplers.solvers import solver_info


def slerp(a: Tensor, b: Tensor, shares: Sequence[float]) -> Tensor:
    """Points (len(shares), ...) on the arc from `a` to `b` (both of one shape), at these shares of its angle.

    (sin((1 - s) w) a + sin(s w) b) / sin w for the angle w between them (Shoemake 1985): between two draws of noise
    these have the length of noise, which those on a straight line do not.
    """
    flat_a, flat_b = (x.flatten().cpu().double() for x in (a, b))
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=0)
    angle = torch.acos(cosine.clamp(-1, 1)).item()
    s = torch.tensor(list(shares), dtype=torch.float64).reshape(-1, *[1] * a.ndim)
    if angle < 1e-4:  # one and the same direction: the arc is a line
        of_a, of_b = 1 - s, s
    else:
        of_a, of_b = (torch.sin(share * angle) / torch.sin(torch.tensor(angle)) for share in (1 - s, s))
    return of_a.to(a) * a + of_b.to(a) * b


def noised(x: Tensor, noise: Tensor, t: float, path: Interpolant) -> Tensor:
    """The state of data x (B, ...) with that `noise` at the time t; SDEdit (Meng et al. 2022) starts there."""
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return c.alpha.item() * x + c.sigma.item() * noise


@torch.no_grad()
def inpaint(
    velocity_fn: VelocityFn,
    x: Tensor,
    mask: Tensor,
    noise: Tensor,
    solver: str = "heun",
    steps: int | None = None,
    *,
    resample: int = 1,
    path: Interpolant | None = None,
    times: TimeGrid | Sequence[float] | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    return_info: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, SampleInfo]:
    """Data whose known part is that of x and whose rest, where `mask` is true, fits to it: RePaint (Lugmayr et al.
    2022, algorithm 1) with the steps of an ODE solver.

    After each step from t to s, the known part is replaced by a draw of x_s given x. Then `resample` - 1 times noise is
    added, back to t, and the step is taken again, so that both parts come to fit; without that (1) the new part sees
    the known one only through its noise. The other arguments are those of `sample_ode`; a solver that remembers earlier
    steps begins anew at each.

    Args:
        x: (B, ...), the data of which a part is kept.
        mask: (B, ...), true where it is not; it may have one channel for all.
        noise: (B, ...), standard normal, what the rest begins with.
        resample: how often each step is taken.
        seed: what the noise of the replaced parts comes from, with
        indices: the samples' indices, as in `sample_sde`.

    Raises:
        UserError: as `sample_ode`, and for a solver without fixed steps.
    """
    info, field = solver_info(solver, "ode"), Field(velocity_fn, path)
    if info.kind == "adaptive":
        raise UserError(f"'{solver}' chooses its own steps, and between them the known part is replaced; take heun")
    if resample < 1:
        raise UserError(f"resample={resample}: each step is taken at least once")
    draw = _Draws(StepNoise(seed, range(len(x)) if indices is None else indices))
    plan = plan_times(field, info, steps, times)
    x, nfe = as_state(x), 0
    state = torch.where(mask, field.path.noise_scale * as_state(noise), noised(x, as_state(noise), plan[0], field.path))
    states = [state]
    for t, s in pairwise(plan):
        for again in reversed(range(resample if s > 0 else 1)):  # at s = 0 the known part is what it shall be
            state, step = sample_ode(velocity_fn, state, solver, path=path, times=[t, s], return_info=True, **options)
            state, nfe = torch.where(mask, state, noised(x, draw(x), s, field.path)), nfe + step.nfe
            if again:
                state = _back(state, draw(x), s, t, field.path)
        states = [*states, state] if return_info else [state]
    return (state, SampleInfo(nfe, plan, states)) if return_info else state


class _Draws:
    """Noise like a tensor, other at each call."""

    def __init__(self, noise: StepNoise):
        self.noise, self.count = noise, -1

    def __call__(self, like: Tensor) -> Tensor:
        self.count += 1
        return self.noise(self.count, like)


def _back(x: Tensor, noise: Tensor, s: float, t: float, path: Interpolant) -> Tensor:
    """The state at t > s, given that x is the one at s: x_t = k x_s + sqrt(sigma_t^2 - k^2 sigma_s^2) noise with
    k = alpha_t / alpha_s."""
    c = path.coefficients(torch.tensor([s, t], dtype=torch.float64))
    keep = (c.alpha[1] / c.alpha[0]).item()
    return keep * x + (c.sigma[1] ** 2 - keep**2 * c.sigma[0] ** 2).clamp(min=0).sqrt().item() * noise
