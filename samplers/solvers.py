"""The solvers by name, whatever they solve, and facts about each; `dic_repa.protocols` says how they are called."""

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
    """All solvers, or those of one `process` ('ode', 'sde' or 'ddpm'), in the order in which to read about them."""
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
