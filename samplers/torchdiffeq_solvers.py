"""The methods of torchdiffeq, fixed and adaptive, behind the same field that our own solvers integrate."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from dic_repa.errors import UserError
from dic_repa.samplers.field import Field

# torchdiffeq's own default is the twelfth order, which is unstable at the step sizes of sampling.
_FIXED_OPTIONS = {"explicit_adams": {"max_order": 5}, "implicit_adams": {"max_order": 4}}


class _Adapter:
    """The field as torchdiffeq calls it, (t, x) with a scalar tensor t; passes on where the steps start."""

    def __init__(self, field: Field, steps: Iterator[tuple[float, float]] | None = None):
        self.field, self.steps = field, steps
        if steps is not None:
            self.callback_step = lambda t, x, dt: field.begin_step(*next(steps))

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.field(x, t)


def integrate_fixed(
    field: Field, x: Tensor, times: list[float], method: str, options: dict, rtol: float, atol: float, every: bool
) -> list[Tensor]:
    """States at `times` (if `every`; else at the last only) by a fixed-grid method over that grid."""
    if method in _FIXED_OPTIONS:
        _check_uniform(times, method)
    grid = torch.tensor(times, dtype=torch.float64, device=x.device)
    options = {**_FIXED_OPTIONS.get(method, {}), "grid_constructor": lambda func, y0, t: grid, **options}
    adapter = _Adapter(field, iter(pairwise(times)))
    stops = grid if every else grid[[0, -1]]
    states = odeint(adapter, x, stops, rtol=rtol, atol=atol, method=method, options=options)
    return list(states[1:])


def integrate_adaptive(
    field: Field, x: Tensor, times: list[float], method: str, options: dict, rtol: float, atol: float
) -> list[Tensor]:
    """States at `times[1:]` by an adaptive method, which starts anew at each of the field's breakpoints."""
    states = []
    for t, s in pairwise(times):
        inside = [point for point in field.breakpoints if min(t, s) < point < max(t, s)]
        stops = [t, *sorted(inside, reverse=s < t), s]
        for start, stop in pairwise(stops):
            # A stretch between breakpoints lies on one side of each of them, and its middle tells on which.
            field.begin_step(0.5 * (start + stop), None)
            ends = torch.tensor([start, stop], dtype=torch.float64, device=x.device)
            # Without it the last step goes beyond the end, where there may be no velocity, and is interpolated.
            landing = {} if method == "scipy_solver" else {"step_t": ends[1:]}
            x = odeint(_Adapter(field), x, ends, rtol=rtol, atol=atol, method=method, options=landing | options)[-1]
        states.append(x)
    return states


def _check_uniform(times: list[float], method: str) -> None:
    sizes = [s - t for t, s in pairwise(times)]
    if max(sizes) - min(sizes) > 1e-9:
        raise UserError(f"'{method}' needs steps of one size; take ab2 or ab3 for other time grids")
