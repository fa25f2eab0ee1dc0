"""Fixed-step ODE solvers.

`dic_repa.protocols.ODESolver` says how they are called. `dic-repa solvers` shows the first sentence of each docstring.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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
