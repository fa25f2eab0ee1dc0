"""Sampling by the probability-flow ODE dx/dt = v(x, t), from noise at t = 1 to data at t = 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.paths import Path
from dic_repa.registry import Registry
from dic_repa.samplers.field import Field, VelocityFn, as_state

Step = Callable[[Field, Tensor, float, float], Tensor]
steps_registry = Registry("solver")


@steps_registry.register("euler")
def euler(field: Field, x: Tensor, t: float, s: float) -> Tensor:
    return x + (s - t) * field(x, t)


@steps_registry.register("heun")
def heun(field: Field, x: Tensor, t: float, s: float) -> Tensor:
    """The trapezoidal rule behind an Euler step; the step onto t = 0 is an Euler step, as in EDM and REPA."""
    v = field(x, t)
    end = x + (s - t) * v
    return end if s == 0 else x + 0.5 * (s - t) * (v + field(end, s))


@torch.no_grad()
def sample_ode(
    velocity_fn: VelocityFn,
    noise: Tensor,
    solver: str = "heun",
    steps: int | None = None,
    *,
    path: Path | None = None,
    times: Sequence[float] | None = None,
) -> Tensor:
    """Integrate `velocity_fn` (x (B, ...), t (B,)) -> (B, ...) from `noise` (B, ...) at t = 1 to data at t = 0.

    `times` replaces the uniform grid of `steps` steps. Returns the data (B, ...) in the state's dtype: that of `noise`,
    at least float32.

    Raises UserError for an unknown solver or less than one step.
    """
    step = steps_registry.get(solver)
    field = Field(velocity_fn, path)
    if times is None:
        if steps is None or steps < 1:
            raise UserError(f"steps={steps}: solver '{solver}' needs a step count of at least 1")
        low, high = field.time_range()
        times = torch.linspace(high, low, steps + 1, dtype=torch.float64).tolist()
    x = as_state(noise)
    for t, s in pairwise(times):
        field.begin_step(t, s)
        x = step(field, x, t, s)
    field.begin_step(None, None)
    return x
