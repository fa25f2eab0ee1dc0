"""The methods of torchdiffeq, fixed and adaptive, behind the same field that our own solvers integrate.

Each takes all steps itself, by `integrate(field, x, times, options, rtol, atol, every)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from dic_repa.errors import UserError
from dic_repa.samplers.field import Field
from dic_repa.samplers.solvers import ode_solvers


class _Adapter:
    """The field as torchdiffeq calls it, (t, x) with a scalar tensor t; passes on where the steps start."""

    def __init__(self, field: Field, steps: Iterator[tuple[float, float]] | None = None):
        self.field, self.steps = field, steps
        if steps is not None:
            self.callback_step = lambda t, x, dt: field.begin_step(*next(steps))

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.field(x, t)


@dataclass(frozen=True)
class FixedGrid:
    """A method that takes the steps it is given."""

    method: str
    order: int
    evaluations: int | None  # None: it iterates to the tolerances
    options: dict[str, Any] = field(default_factory=dict)
    uniform: bool = False  # steps of one size only

    def integrate(
        self, field: Field, x: Tensor, times: list[float], options: dict, rtol: float, atol: float, every: bool
    ) -> list[Tensor]:
        """States at `times[1:]` (if `every`; else at the last only)."""
        if self.uniform:
            _check_uniform(times, self.method)
        grid = torch.tensor(times, dtype=torch.float64, device=x.device)
        options = {**self.options, "grid_constructor": lambda func, y0, t: grid, **options}
        adapter = _Adapter(field, iter(pairwise(times)))
        stops = grid if every else grid[[0, -1]]
        states = odeint(adapter, x, stops, rtol=rtol, atol=atol, method=self.method, options=options)
        return list(states[1:])


@dataclass(frozen=True)
class Adaptive:
    """A method that chooses its steps by the tolerances; it starts anew at each of the field's breakpoints."""

    method: str
    order: int
    evaluations = None
    adaptive = True

    def integrate(
        self, field: Field, x: Tensor, times: list[float], options: dict, rtol: float, atol: float, every: bool
    ) -> list[Tensor]:
        """States at `times[1:]`."""
        states = []
        for t, s in pairwise(times):
            inside = [point for point in field.breakpoints if min(t, s) < point < max(t, s)]
            stops = [t, *sorted(inside, reverse=s < t), s]
            for start, stop in pairwise(stops):
                # A stretch between breakpoints lies on one side of each of them, and its middle tells on which.
                field.begin_step(0.5 * (start + stop), None)
                ends = torch.tensor([start, stop], dtype=torch.float64, device=x.device)
                # Without it the last step goes beyond the end, where there may be no velocity, and is interpolated.
                landing = {} if self.method == "scipy_solver" else {"step_t": ends[1:]}
                given = landing | options
                x = odeint(_Adapter(field), x, ends, rtol=rtol, atol=atol, method=self.method, options=given)[-1]
            states.append(x)
        return states


def _check_uniform(times: list[float], method: str) -> None:
    sizes = [s - t for t, s in pairwise(times)]
    if max(sizes) - min(sizes) > 1e-9:
        raise UserError(f"'{method}' needs steps of one size; take ab2 or ab3 for other time grids")


ode_solvers.register("midpoint", description="one evaluation in the middle of the step; as accurate as heun")(
    FixedGrid("midpoint", 2, 2)
)
ode_solvers.register("heun2", description="heun without the Euler step at the end")(FixedGrid("heun2", 2, 2))
ode_solvers.register("heun3", description="Heun's third-order Runge-Kutta method")(FixedGrid("heun3", 3, 3))
ode_solvers.register("rk4", description="fourth-order Runge-Kutta (3/8 rule); for reference values at few, long steps")(
    FixedGrid("rk4", 4, 4)
)
# torchdiffeq's own default is the twelfth order, which is unstable at the step sizes of sampling.
ode_solvers.register("explicit_adams", description="Adams-Bashforth on a uniform grid, started by rk4")(
    FixedGrid("explicit_adams", 4, 1, {"max_order": 5}, uniform=True)
)
ode_solvers.register("implicit_adams", description="Adams-Moulton on a uniform grid, iterated to rtol and atol")(
    FixedGrid("implicit_adams", 4, None, {"max_order": 4}, uniform=True)
)
ode_solvers.register(
    "dopri5", description="Dormand-Prince; the one to take for inversion, likelihood and reference samples"
)(Adaptive("dopri5", 5))
ode_solvers.register("dopri8", description="Dormand-Prince of eighth order; for tolerances below 1e-7, in float64")(
    Adaptive("dopri8", 8)
)
ode_solvers.register("bosh3", description="Bogacki-Shampine; fewer evaluations than dopri5 at tolerances above 1e-3")(
    Adaptive("bosh3", 3)
)
ode_solvers.register("fehlberg2", description="Runge-Kutta-Fehlberg; its error is about a hundred times the tolerance")(
    Adaptive("fehlberg2", 2)
)
ode_solvers.register("adaptive_heun", description="heun with an error estimate")(Adaptive("adaptive_heun", 2))
ode_solvers.register(
    "scipy_solver", description="a method of scipy's solve_ivp on the CPU (LSODA unless the options name another)"
)(Adaptive("scipy_solver", 5))
