"""The likelihood of data under the probability-flow ODE."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.interpolants import Interpolant
from dic_repa.samplers.field import Field, VelocityFn, as_state
from dic_repa.samplers.noise import rademacher
from dic_repa.samplers.ode import sample_ode
from dic_repa.samplers.solvers import solver_info

DIVERGENCES = ("exact", "hutchinson")


@dataclass(frozen=True)
class Likelihood:
    """log p(x) (B,) in nats and in bits per dimension, the noise (B, ...) that x maps to, and the evaluations."""

    log_prob: Tensor
    bits_per_dim: Tensor
    noise: Tensor = field(repr=False)
    nfe: int


def log_likelihood(
    velocity_fn: VelocityFn,
    x: Tensor,
    path: Interpolant | None = None,
    *,
    divergence: str = "hutchinson",
    probes: int = 1,
    solver: str = "dopri5",
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    times: Sequence[float] | None = None,
    bin_width: float = 2 / 256,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Likelihood:
    """log p(x) = log N(x_1; 0, s^2 I) + int_0^1 div v(x_t, t) dt along the ODE from x at t = 0 (Chen et al. 2018), with
    s the path's `noise_scale`; the noise that is returned is x_1 / s.

    The other arguments are those of `sample_ode`, with rising times. If the field's range begins above 0, x is taken as
    the state there.

    Args:
        divergence: 'exact', with a backward pass for every dimension; or 'hutchinson', the estimate e^T (dv/dx) e.
        probes: vectors e of random signs to average over; each depends on (`seed`, the sample's index) alone.
        bin_width: the distance of neighbouring values in the data, 2/256 for 8-bit images in [-1, 1] with uniform noise
            of a bin added; bits per dimension are those of the discrete values.

    Raises:
        UserError: as `sample_ode`, and for a velocity without a gradient by x.
    """
    if divergence not in DIVERGENCES:
        raise unknown_name("divergence", divergence, DIVERGENCES)
    if probes < 1:
        raise UserError(f"probes={probes}: give at least 1")
    signs = None
    if divergence == "hutchinson":
        rows = range(len(x)) if indices is None else indices
        signs = [rademacher(x.shape[1:], seed, rows, probe).to(x.device) for probe in range(probes)]
    state = as_state(x).flatten(1)
    augmented = _AugmentedField(velocity_fn, x.shape[1:], signs)
    info = solver_info(solver, "ode")

    def largest_norm(state: Tensor) -> Tensor:
        """The larger of the root mean squares of x and of log p, whose error would not count among the many of x."""
        return torch.maximum(*(part.square().mean().sqrt() for part in (state[:, :-1], state[:, -1])))

    options = {"norm": largest_norm} if info.kind == "adaptive" and solver != "scipy_solver" else None
    start = torch.cat([state, state.new_zeros(len(state), 1)], dim=1)
    given: dict[str, Any] = {"path": path, "times": times, "rtol": rtol, "atol": atol, "options": options}
    result = sample_ode(augmented, start, solver, steps, direction="backward", **given)
    assert isinstance(result, Tensor)  # return_info is not asked for
    scale = augmented.path.noise_scale if path is None else path.noise_scale
    noise, change = result[:, :-1] / scale, result[:, -1]
    dimensions = noise.shape[1]
    change = change - dimensions * math.log(scale)
    log_prob = change - 0.5 * (noise.square().sum(1) + dimensions * math.log(2 * math.pi))
    bits_per_dim = -log_prob / (dimensions * math.log(2)) - math.log2(bin_width)
    return Likelihood(log_prob, bits_per_dim, noise.reshape(x.shape), augmented.nfe)


class _AugmentedField:
    """The velocity of (x, log-density) as one state (B, D + 1), so that any ODE solver integrates both."""

    def __init__(self, velocity_fn: VelocityFn, shape: Sequence[int], signs: list[Tensor] | None):
        self.velocity_fn, self.shape, self.signs = velocity_fn, shape, signs
        inner = Field(velocity_fn)
        self.path, self.breakpoints, self.begin_step = inner.path, inner.breakpoints, inner.begin_step
        self.time_range = getattr(velocity_fn, "time_range", (0.0, 1.0))
        self.nfe = 0

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = state[:, :-1].reshape(-1, *self.shape).detach().requires_grad_()
            v = self.velocity_fn(x, t).to(x.dtype)
            self.nfe += getattr(self.velocity_fn, "evaluations", 1)
            if not v.requires_grad:
                raise UserError("the velocity has no gradient by x; compute it without torch.no_grad for a likelihood")

            def gradient(value: Tensor) -> Tensor:
                return torch.autograd.grad(value, x, retain_graph=True)[0].flatten(1)

            if self.signs is None:
                terms = [gradient(column)[:, i] for i, column in enumerate(v.flatten(1).sum(0))]
                divergence = torch.stack(terms).sum(0)
            else:
                estimates = [(gradient((v * sign).sum()) * sign.flatten(1)).sum(1) for sign in self.signs]
                divergence = torch.stack(estimates).mean(0)
        return torch.cat([v.detach().flatten(1), divergence[:, None]], dim=1)
