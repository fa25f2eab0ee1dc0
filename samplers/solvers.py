"""The solvers by name, facts about each, and one entrance to all; `dic_repa.protocols` says how they are called."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dic_repa.errors import UserError, did_you_mean, unknown_name
from dic_repa.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "sample.solver"
ode_solvers = Registry("ODE solver", modules=["dic_repa.samplers.ode_solvers"], key=_KEY, functions=True)
sde_solvers = Registry("SDE solver", modules=["dic_repa.samplers.sde"], key=_KEY, functions=True)
ddpm_solvers = Registry("DDPM solver", modules=["dic_repa.samplers.ddpm"], key=_KEY, functions=True)
SOLVERS = {"ode": ode_solvers, "sde": sde_solvers, "ddpm": ddpm_solvers}


@dataclass(frozen=True)
class SolverInfo:
    """Facts about a solver."""

    name: str
    process: str  # 'ode', 'sde' or 'ddpm': which sampler takes it
    kind: str  # 'fixed' (takes `steps`) or 'adaptive' (takes `rtol` and `atol`)
    order: int  # of the global error in the step size; for an SDE solver the weak order
    evaluations: int | None  # of the network per step; None: the solver chooses
    deterministic: bool
    description: str


def register_solver(
    name: str, order: int = 1, evaluations: int = 1, description: str | None = None
) -> Callable[[Any], Any]:
    """Decorator that registers a step function, or a class of them, as a fixed-step ODE solver.

        @register_solver("my-euler")
        def my_euler(field, x, t, s):  # x (B, ...) from time t to s, both floats; field(x, t) is the velocity
            return x + (s - t) * field(x, t)

    `dic-repa solvers` shows `order`, `evaluations` a step, and the `description` or the docstring's first sentence.

    Raises:
        UserError: if another solver has this name.
    """
    ode_solvers.names()  # loads the package's own, so that their names are taken
    if name in sde_solvers or name in ddpm_solvers:
        raise UserError(f"solver '{name}' is registered already; choose another name")
    facts = {"description": description} if description else {}
    return ode_solvers.register(name, order=order, evaluations=evaluations, **facts)


def list_solvers(process: str | None = None) -> list[SolverInfo]:
    """All solvers, or those of one `process` ('ode', 'sde' or 'ddpm'), in the order of a list for reading."""
    return [_info(name, kind) for kind in SOLVERS if process in (None, kind) for name in SOLVERS[kind]]


def solver_info(name: str, process: str | None = None) -> SolverInfo:
    """The solver `name`, registered or `package.module:factory`; a UserError if it is not for this `process`."""
    known = [SOLVERS[kind] for kind in SOLVERS if process in (None, kind)]
    owner = next((kind for kind, registry in SOLVERS.items() if name in registry), None)
    if owner is None and ":" in name:
        owner = _process(ode_solvers.find(name))
    if owner is None:
        raise unknown_name("solver", name, [other for registry in known for other in registry])
    if process not in (None, owner):
        others = ", ".join(name for registry in known for name in registry)
        raise UserError(f"'{name}' is a solver for sample_{owner}; sample_{process} takes {others}")
    return _info(name, owner)


def start_solver(name: str, process: str, **options: Any) -> Any:
    """The step function of a solver of this process for one run; a UserError for options that it does not take."""
    solver_info(name, process)
    entry = SOLVERS[process].find(name)
    if inspect.isclass(entry):
        return SOLVERS[process].create(name, **options)
    if options:
        raise UserError(f"solver '{name}' takes no options such as {', '.join(options)}")
    return entry


def _info(name: str, process: str) -> SolverInfo:
    solvers = SOLVERS[process]
    order, evaluations = solvers.fact(name, "order", 1), solvers.fact(name, "evaluations", 1)
    deterministic = solvers.fact(name, "deterministic", process == "ode")
    kind = "adaptive" if solvers.fact(name, "adaptive", False) else "fixed"
    return SolverInfo(name, process, kind, order, evaluations, deterministic, solvers.describe(name))


def _process(entry: Any) -> str:
    """Which process an unregistered solver is for: its `process`, or else by whether its step is given noise."""
    step = entry.__call__ if inspect.isclass(entry) else entry
    own = getattr(entry, "process", None)
    if own in SOLVERS or hasattr(entry, "integrate"):
        return own or "ode"
    return "sde" if len(inspect.signature(step).parameters) - inspect.isclass(entry) == 5 else "ode"


def sample(model_fn: Callable[[Tensor, Tensor], Tensor], noise: Tensor, solver: str = "heun", **options):
    """`sample_ode`, `sample_sde` or `sample_ddpm`, whichever has the `solver`, with its options.

    Options that are None count as not given; one that the solver does not have is a UserError.
    """
    process = solver_info(solver).process
    options = {name: value for name, value in options.items() if value is not None}
    accepted = _options(process)
    for name in options.keys() - accepted:
        owners = [other.upper() for other in SOLVERS if name in _options(other)]
        if owners:
            raise UserError(f"'{name}' is for {' and '.join(owners)} solvers; '{solver}' samples by {process.upper()}")
        raise UserError(f"unknown option '{name}' of solver '{solver}'{did_you_mean(name, accepted)}")
    return _sampler(process)(model_fn, noise, solver=solver, **options)


def _sampler(process: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"dic_repa.samplers.{process}"), f"sample_{process}")


def _options(process: str) -> set[str]:
    return set(list(inspect.signature(_sampler(process)).parameters)[2:]) - {"solver"}
