"""The ODE solvers: our own of fixed steps, and torchdiffeq's, fixed and adaptive, behind the same field.

`dic_repa.protocols.ODESolver` says how they are called. `dic-repa solvers` shows the first sentence of each docstring.
torchdiffeq's take all steps themselves, by `integrate(field, x, times, options, rtol, atol, every)`.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchdiffeq import odeint

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant
from dic_repa.samplers.field import Field
from dic_repa.samplers.solvers import ode_solvers


@ode_solvers.register("euler", order=1, evaluations=1)
def euler(field: Field, x: Tensor, t: float, s: float) -> Tensor:
    """The simplest; a fair default where the velocity is nearly straight or steps are many."""
    return x + (s - t) * field(x, t)


@ode_solvers.register("heun", order=2, evaluations=2)
def heun(field: Field, x: Tensor, t: float, s: float) -> Tensor:
    """Euler, corrected at the step's end (EDM, REPA); a safe choice at 20 to 50 steps.

    The trapezoidal rule behind an Euler step; the step onto t = 0 is an Euler step, as in EDM and REPA.
    """
    v = field(x, t)
    end = x + (s - t) * v
    return end if s == 0 else x + 0.5 * (s - t) * (v + field(end, s))


@ode_solvers.register("meanflow", order=1, evaluations=1)
class MeanFlowStep:
    """For models of average velocities (objective meanflow), in 1 or 2 steps.

    x_s = x_t - (t - s) u(x_t, s, t) (Geng et al. 2025, arXiv 2505.13447, eq. 12), exact at any step size if u is.
    """

    forward_only = True  # u is known from the noisier state alone

    def __call__(self, field: Field, x: Tensor, t: float, s: float) -> Tensor:
        return x + (s - t) * field.average(x, t, s)


@ode_solvers.register("ab2", order=2, evaluations=1)
class AdamsBashforth2:
    """Second order for Euler's price: reuses the last velocity (Adams-Bashforth).

    x_s = x_t + int_t^s p, with p the polynomial through the last velocities at their times, on any time grid.
    """

    order = 2

    def __init__(self):
        self.past: deque[tuple[float, Tensor]] = deque(maxlen=self.order)  # (time, velocity), newest first

    def __call__(self, field: Field, x: Tensor, t: float, s: float) -> Tensor:
        v = field(x, t)
        self.past.appendleft((t, v))
        h = s - t
        # With no past, a method of third order needs a first step of second order.
        if len(self.past) == 1 and self.order == 3:
            return x + 0.5 * h * (v + field(x + h * v, s))
        return x + polynomial_integral(self.past, [h, h**2 / 2, h**3 / 3])


@ode_solvers.register("ab3", order=3, evaluations=1)
class AdamsBashforth3(AdamsBashforth2):
    """Third order for Euler's price: reuses the last two velocities (Adams-Bashforth).

    Its first step takes a second evaluation.
    """

    order = 3


@ode_solvers.register("dpmpp-2m", order=2, evaluations=1)
class DPMSolverPP2M:
    """Multistep in the data prediction (DPM-Solver++ 2M).

    Lu et al. 2022: the ODE solved exactly but for the data prediction D, which is extrapolated.

    With q = alpha / sigma, d(x / sigma) = D dq, so x_s = (sigma_s / sigma_t) x_t + sigma_s int_t^s D dq; D is the
    polynomial through the last predictions. The paper's is a polynomial in log q. Here it is one in t, since log q is
    infinite at both ends of a flow's path, where the paper's form would lose its order.
    """

    order = 2
    forward_only = True  # there is no such step from pure data, where sigma = 0

    def __init__(self):
        self.past: deque[tuple[float, Tensor]] = deque(maxlen=self.order)  # (time, D), newest first

    def __call__(self, field: Field, x: Tensor, t: float, s: float) -> Tensor:
        data = field.data(x, t)
        self.past.appendleft((t, data))
        keep, moments = _data_moments(field.path, t, s)
        if len(self.past) == 1 and self.order == 3:
            middle = 0.5 * (t + s)
            keep_half, (total_half, *_) = _data_moments(field.path, t, middle)
            return keep * x + moments[0] * field.data(keep_half * x + total_half * data, middle)
        return keep * x + polynomial_integral(self.past, moments)


@ode_solvers.register("dpmpp-3m", order=3, evaluations=1)
class DPMSolverPP3M(DPMSolverPP2M):
    """Multistep in the data prediction (DPM-Solver++ 3M); for 16 evaluations and more.

    Its first step takes a second evaluation.
    """

    order = 3


def polynomial_integral(past: Sequence[tuple[float, Tensor]], moments: Sequence[float]) -> Tensor:
    """The integral over a step of the polynomial in time through `past`, (time, value) pairs with the newest first.

    `moments[k]` is the integral of (tau - newest time)^k.
    """
    offsets = np.array([time - past[0][0] for time, _ in past])
    powers = np.vander(offsets, increasing=True).T
    weights = np.linalg.solve(powers, np.array(moments[: len(past)]))
    terms = (float(weight) * value for weight, (_, value) in zip(weights, past))
    return sum(terms, torch.zeros_like(past[0][1]))


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


def _data_moments(path: Interpolant, t: float, s: float) -> tuple[float, list[float]]:
    """sigma_s / sigma_t, and sigma_s int_t^s (tau - t)^k dq(tau) for k = 0, 1, 2 with q = alpha / sigma.

    By parts, that is (s - t)^k alpha_s - k sigma_s int_t^s (tau - t)^(k - 1) q dtau for k > 0. The integral is taken in
    log tau, in which q tau is smooth towards 0; at s = 0 its product with sigma_s vanishes.
    """
    ends = path.coefficients(torch.tensor([t, s], dtype=torch.float64))
    (alpha_t, alpha_s), (sigma_t, sigma_s) = ends.alpha.tolist(), ends.sigma.tolist()
    keep = sigma_s / sigma_t
    moments = [alpha_s - keep * alpha_t, (s - t) * alpha_s, (s - t) ** 2 * alpha_s]
    if s > 0:
        log_t, log_s = math.log(t), math.log(s)
        tau = np.exp(0.5 * (log_t + log_s) + 0.5 * (log_s - log_t) * _NODES)
        c = path.coefficients(torch.from_numpy(tau))
        weights = 0.5 * (log_s - log_t) * _WEIGHTS * tau * (c.alpha / c.sigma).numpy()
        moments[1] -= sigma_s * float(weights.sum())
        moments[2] -= 2 * sigma_s * float((weights * (tau - t)).sum())
    return keep, moments


class _Adapter:
    """The field as torchdiffeq calls it, (t, x) with a scalar tensor t; it says where each step starts."""

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
        sizes = [s - t for t, s in pairwise(times)]
        if self.uniform and max(sizes) - min(sizes) > 1e-9:
            raise UserError(f"'{self.method}' needs steps of one size; take ab2 or ab3 for other time grids")
        grid = torch.tensor(times, dtype=torch.float64, device=x.device)
        options = {**self.options, "grid_constructor": lambda func, y0, t: grid, **options}
        adapter = _Adapter(field, iter(pairwise(times)))
        stops = grid if every else grid[[0, -1]]
        states = odeint(adapter, x, stops, rtol=rtol, atol=atol, method=self.method, options=options)
        return list(states[1:])


@dataclass(frozen=True)
class Adaptive:
    """A method that chooses its steps by the tolerances; it starts again at each of the field's breakpoints."""

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
                # A stretch between two breakpoints lies on one side of each; its middle says on which.
                field.begin_step(0.5 * (start + stop), None)
                ends = torch.tensor([start, stop], dtype=torch.float64, device=x.device)
                # Otherwise the last step goes beyond the end, where there may be no velocity, and is interpolated.
                landing = {} if self.method == "scipy_solver" else {"step_t": ends[1:]}
                given = landing | options
                x = odeint(_Adapter(field), x, ends, rtol=rtol, atol=atol, method=self.method, options=given)[-1]
            states.append(x)
        return states


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
ode_solvers.register("dopri5", description="Dormand-Prince; take it for inversion, likelihood and reference samples")(
    Adaptive("dopri5", 5)
)
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
