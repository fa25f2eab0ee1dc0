"""One entrance to all samplers, for those who let a user name the solver."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dic_repa.errors import UserError, did_you_mean
from dic_repa.samplers.ddpm import sample_ddpm
from dic_repa.samplers.ode import sample_ode
from dic_repa.samplers.sde import sample_sde
from dic_repa.samplers.solvers import solver_info

_SAMPLERS: dict[str, Callable[..., Any]] = {"ode": sample_ode, "sde": sample_sde, "ddpm": sample_ddpm}


def sample(model_fn: Callable[[Tensor, Tensor], Tensor], noise: Tensor, solver: str = "heun", **options):
    """`sample_ode`, `sample_sde` or `sample_ddpm`, whichever has the `solver`, with its options.

    Options that are None count as not given; one that the solver does not have is a UserError.
    """
    process = solver_info(solver).process
    options = {name: value for name, value in options.items() if value is not None}
    accepted = _options(process)
    for name in options.keys() - accepted:
        owners = [other.upper() for other in _SAMPLERS if name in _options(other)]
        if owners:
            raise UserError(f"'{name}' is for {' and '.join(owners)} solvers; '{solver}' samples by {process.upper()}")
        raise UserError(f"unknown option '{name}' of solver '{solver}'{did_you_mean(name, accepted)}")
    return _SAMPLERS[process](model_fn, noise, solver=solver, **options)


def _options(process: str) -> set[str]:
    return set(list(inspect.signature(_SAMPLERS[process]).parameters)[2:]) - {"solver"}
