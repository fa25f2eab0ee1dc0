"""The solvers by name, whatever they solve, and what a user wants to know of each.

A solver is a function that takes one step; a class whose objects are such functions, one for each run, where it
remembers earlier steps or has options; or, of ODEs, an object with `integrate`, which takes all steps itself.
`dic_repa.protocols` says what each is called with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dic_repa.errors import UserError, unknown_name
from dic_repa.registry import Registry

_KEY = "sample.solver"
ode_solvers = Registry(
    "ODE solver", modules=["dic_repa.samplers.ode_solvers", "dic_repa.samplers.torchdiffeq_solvers"], key=_KEY
)
sde_solvers = Registry("SDE solver", modules=["dic_repa.samplers.sde"], key=_KEY)
ddpm_solvers = Registry("DDPM solver", modules=["dic_repa.samplers.ddpm"], key=_KEY)
SOLVERS = {"ode": ode_solvers, "sde": sde_solvers, "ddpm": ddpm_solvers}


@dataclass(frozen=True)
class SolverInfo:
    """What a user wants to know of a solver.

    `order` is that of the global error in the step size (for an SDE solver the weak order); `evaluations` is the number
    of network evaluations per step, None where the solver chooses.
    """

    name: str
    process: str  # 'ode', 'sde' or 'ddpm': which sampler takes it
    kind: str  # 'fixed' (takes `steps`) or 'adaptive' (takes `rtol` and `atol`)
    order: int
    evaluations: int | None
    deterministic: bool
    description: str


def register_solver(
    name: str, order: int = 1, evaluations: int = 1, description: str | None = None
) -> Callable[[Any], Any]:
    """Decorator that makes a fixed-step ODE solver of a step function, or of a class of them where it has a memory;
    `order` and `evaluations` a step are what `dic-repa solvers` tells of it, with the docstring's first sentence.

        @register_solver("my-euler")
        def my_euler(field, x, t, s):  # x (B, ...) from time t to s, both floats; field(x, t) is the velocity
            return x + (s - t) * field(x, t)

    Raises UserError where another solver has this name.
    """
    ode_solvers.names()  # those of the package come first, so that a name of theirs is known to be taken
    if name in sde_solvers or name in ddpm_solvers:
        raise UserError(f"solver '{name}' is registered already; choose another name")
    facts = {"description": description} if description else {}
    return ode_solvers.register(name, order=order, evaluations=evaluations, **facts)


def list_solvers(process: str | None = None) -> list[SolverInfo]:
    """All solvers, or those of one `process` ('ode', 'sde' or 'ddpm'), in the order in which to read about them."""
    return [_info(name, kind) for kind in SOLVERS if process in (None, kind) for name in SOLVERS[kind]]


def solver_info(name: str, process: str | None = None) -> SolverInfo:
    """The solver `name`, registered or `package.module:factory`.

    Raises:
        UserError: where there is none, or where it is not one of the `process` asked for.
    """
    known = [SOLVERS[kind] for kind in SOLVERS if process in (None, kind)]
    owner = next((kind for kind, registry in SOLVERS.items() if name in registry), None)
    if owner is None and ":" in name:
        owner = _process(ode_solvers.find(name))
    if owner is None:
        raise unknown_name("solver", name, [other for registry in known for other in registry])
    if process not in (None, owner):
        samplers = {"ode": "sample_ode", "sde": "sample_sde", "ddpm": "sample_ddpm"}
        others = ", ".join(name for registry in known for name in registry)
        raise UserError(f"'{name}' is a solver for {samplers[owner]}; {samplers[str(process)]} takes {others}")
    return _info(name, owner)


def start_solver(name: str, process: str, **options: Any) -> Any:
    """The step function of a solver for one run."""
    entry = SOLVERS[process].find(name)
    return SOLVERS[process].create(name, **options) if inspect.isclass(entry) else entry


def _info(name: str, process: str) -> SolverInfo:
    def fact(key: str, default: Any) -> Any:
        return SOLVERS[process].fact(name, key, default)

    kind = "adaptive" if fact("adaptive", False) else "fixed"
    deterministic = fact("deterministic", process == "ode")
    description = SOLVERS[process].describe(name)
    return SolverInfo(name, process, kind, fact("order", 1), fact("evaluations", 1), deterministic, description)


def _process(entry: Any) -> str:
    """Which process an unregistered solver is for: its `process`, or else by whether its step is given noise."""
    step = entry.__call__ if inspect.isclass(entry) else entry
    own = getattr(entry, "process", None)
    if own in SOLVERS or hasattr(entry, "integrate"):
        return own or "ode"
    return "sde" if len(inspect.signature(step).parameters) - inspect.isclass(entry) == 5 else "ode"
