"""Sampling by the probability-flow ODE dx/dt = v(x, t), from noise at t = 1 to data at t = 0, or back."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.interpolants import Interpolant
from dic_repa.samplers.field import Field, SampleInfo, VelocityFn, as_state
from dic_repa.samplers.grids import TimeGrid, UniformGrid
from dic_repa.samplers.solvers import SolverInfo, ode_solvers, solver_info, start_solver


@torch.no_grad()
def sample_ode(
    velocity_fn: VelocityFn,
    noise: Tensor,
    solver: str = "heun",
    steps: int | None = None,
    *,
    path: Interpolant | None = None,
    times: TimeGrid | Sequence[float] | None = None,
    direction: str = "forward",
    start: float = 1.0,
    rtol: float | None = None,
    atol: float | None = None,
    options: dict | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SampleInfo]:
    """Integrate `velocity_fn` (x (B, ...), t (B,)) -> (B, ...) from `noise` (B, ...) at t = 1 to data at t = 0.

        x0 = sample_ode(Guidance(1.65).bind(model, y), noise, solver="heun", steps=50)

    If the velocity cannot be evaluated down to t = 0 (a VP path; predictions that are divided by sigma), the last step
    gives the data prediction.

    Args:
        steps: their number, for a fixed-step solver.
        path: that of x, if it is not linear and `velocity_fn` does not carry it.
        times: a grid for the `steps`, or the times themselves; for an adaptive solver, times at which to give states.
        direction: 'forward', or 'backward' from data (as `noise`) to noise, the inversion.
        start: the time of `noise`, below 1 for a state that is only partly noise.
        rtol: relative tolerance of an adaptive solver, 1e-5 by default. Its steps suit the whole batch, so a sample
            depends on the others within the tolerances.
        atol: absolute tolerance, 1e-5 by default.
        options: of a torchdiffeq method, or of a class of your own.
        return_info: return a SampleInfo too.

    Returns:
        x (B, ...) in the dtype of `noise`, at least float32.

    Raises:
        UserError: for an unknown solver, and steps, tolerances, options or times that do not fit it.
    """
    info = solver_info(solver, "ode")
    if direction not in ("forward", "backward"):
        raise unknown_name("direction", direction, ("forward", "backward"))
    _check_steps(info, steps, times)
    tolerances = _check_tolerances(info, rtol, atol)
    method, options = ode_solvers.find(solver), options or {}
    whole = hasattr(method, "integrate")
    step = method if whole else start_solver(solver, "ode", **options)
    if direction == "backward" and getattr(step, "forward_only", False):
        raise UserError(f"'{solver}' samples from noise to data only; take heun or dopri5 to invert")
    field = Field(velocity_fn, path)
    plan = plan_times(field, info, steps, times, direction, start)
    # Below the field's range a step cannot evaluate the velocity at its end; it gives the data prediction instead.
    denoise = direction == "forward" and plan[-1] < field.time_range()[0]
    main = plan[:-1] if denoise else plan

    states = [as_state(noise)]
    if len(main) > 1 and whole:
        states += method.integrate(field, states[0], main, options, *tolerances, every=return_info)
    elif len(main) > 1:
        states = field.run(lambda _, x, t, s: step(field, x, t, s), states[0], main, every=return_info)
    if denoise:
        field.begin_step(plan[-2], plan[-1])
        states.append(field.data(states[-1], plan[-2]))
    field.begin_step(None, None)
    return (states[-1], SampleInfo(field.nfe, plan, states)) if return_info else states[-1]


def plan_times(
    field: Field,
    info: SolverInfo,
    steps: int | None,
    times: TimeGrid | Sequence[float] | None,
    direction: str = "forward",
    start: float = 1.0,
) -> list[float]:
    """All times of the integration in order: from the field's highest to t = 0, or backward within its range."""
    low, high = field.time_range()
    forward = direction == "forward"
    high = check_start(start, low, high, times, forward)
    if times is None or callable(times):
        grid = times or UniformGrid()
        if forward and low > 0:
            # The last of the `steps` goes from `low` to 0.
            return [*grid((steps or 2) - 1, high, low, field.path), 0.0] if steps != 1 else [high, 0.0]
        plan = grid(steps or 1, high, low, field.path)
        return plan if forward else plan[::-1]
    plan = check_times(times, low, high, forward)
    if info.kind == "adaptive" and plan[-1] < low < plan[-2]:
        plan.insert(-1, low)
    return plan


def check_start(
    start: float, low: float, high: float, times: TimeGrid | Sequence[float] | None, forward: bool = True
) -> float:
    """The time of the first state: `start`, or `high` if that is lower; a UserError if nothing can start there."""
    if start == 1:
        return high
    if not low < start < 1 or not forward:
        raise UserError(f"start={start}: give a time above {low:g} and at most 1, for the way from noise to data")
    if times is not None and not callable(times):
        raise UserError("give either the time of the start or the times themselves")
    return min(start, high)


def check_times(times: Sequence[float], low: float, high: float, forward: bool = True) -> list[float]:
    """Given `times` as floats, with 1 and 0 at the ends moved into the range [low, high] (0 stays, forward)."""
    plan = [float(t) for t in times]
    if len(plan) < 2 or any((s >= t) if forward else (s <= t) for t, s in pairwise(plan)):
        raise UserError(f"times must {'fall' if forward else 'rise'} from each to the next, and be at least two")
    noisy, clean = (0, -1) if forward else (-1, 0)
    plan[noisy] = high if plan[noisy] == 1 else plan[noisy]
    plan[clean] = low if plan[clean] == 0 and not forward else plan[clean]
    inner = plan[:-1] if forward and plan[-1] == 0 else plan
    if not all(low <= t <= high for t in inner):
        raise UserError(f"times must lie within [{low:g}, {high:g}], where this field can be evaluated")
    return plan


def _check_steps(info: SolverInfo, steps: int | None, times: TimeGrid | Sequence[float] | None) -> None:
    given = times is not None and not callable(times)
    if info.kind == "adaptive":
        if steps is not None or callable(times):
            raise UserError(f"solver '{info.name}' chooses its own steps: give rtol and atol instead of a step count")
    elif given and steps is not None:
        raise UserError("give either a step count or the times themselves")
    elif not given and (steps is None or steps < 1):
        raise UserError(f"solver '{info.name}' takes fixed steps: give a step count of at least 1, not {steps}")


def _check_tolerances(info: SolverInfo, rtol: float | None, atol: float | None) -> list[float]:
    if info.evaluations is not None and (rtol is not None or atol is not None):
        raise UserError(f"solver '{info.name}' takes fixed steps, no tolerances; drop rtol and atol, or take dopri5")
    tolerances = [1e-5 if given is None else given for given in (rtol, atol)]
    if not min(tolerances) > 0:
        raise UserError(f"tolerance {min(tolerances):g}: rtol and atol must be above 0, for example 1e-5")
    return tolerances
