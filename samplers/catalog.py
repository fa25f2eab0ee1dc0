"""What there is to choose from, as data: listing the solvers imports neither torch nor torchdiffeq."""

from __future__ import annotations

from dataclasses import dataclass

from dic_repa.errors import UserError, unknown_name


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
    library: str = "dic_repa"  # or 'torchdiffeq'


def _ode(name: str, order: int, evaluations: int | None, description: str, library: str = "dic_repa") -> SolverInfo:
    return SolverInfo(name, "ode", "fixed", order, evaluations, True, description, library)


def _adaptive(name: str, order: int, description: str) -> SolverInfo:
    return SolverInfo(name, "ode", "adaptive", order, None, True, description, "torchdiffeq")


_SOLVERS = (
    _ode("euler", 1, 1, "the simplest; a fair default where the velocity is nearly straight or steps are many"),
    _ode("heun", 2, 2, "Euler, corrected at the step's end (EDM, REPA); a safe choice at 20 to 50 steps"),
    _ode("midpoint", 2, 2, "one evaluation in the middle of the step; as accurate as heun", "torchdiffeq"),
    _ode("ab2", 2, 1, "second order for Euler's price: reuses the last velocity (Adams-Bashforth)"),
    _ode("ab3", 3, 1, "third order for Euler's price: reuses the last two velocities (Adams-Bashforth)"),
    _ode("dpmpp-2m", 2, 1, "multistep in the data prediction (DPM-Solver++ 2M)"),
    _ode("dpmpp-3m", 3, 1, "multistep in the data prediction (DPM-Solver++ 3M); for 16 evaluations and more"),
    _ode("heun2", 2, 2, "heun without the Euler step at the end", "torchdiffeq"),
    _ode("heun3", 3, 3, "Heun's third-order Runge-Kutta method", "torchdiffeq"),
    _ode("rk4", 4, 4, "fourth-order Runge-Kutta (3/8 rule); for reference values at few, long steps", "torchdiffeq"),
    _ode("explicit_adams", 4, 1, "Adams-Bashforth on a uniform grid, started by rk4", "torchdiffeq"),
    _ode("implicit_adams", 4, None, "Adams-Moulton on a uniform grid, iterated to rtol and atol", "torchdiffeq"),
    _adaptive("dopri5", 5, "Dormand-Prince; the one to take for inversion, likelihood and reference samples"),
    _adaptive("dopri8", 8, "Dormand-Prince of eighth order; for tolerances below 1e-7, in float64"),
    _adaptive("bosh3", 3, "Bogacki-Shampine; fewer evaluations than dopri5 at tolerances above 1e-3"),
    _adaptive("fehlberg2", 2, "Runge-Kutta-Fehlberg; its error is about a hundred times the tolerance"),
    _adaptive("adaptive_heun", 2, "heun with an error estimate"),
    _adaptive("scipy_solver", 5, "a method of scipy's solve_ivp on the CPU (LSODA unless the options name another)"),
    SolverInfo("euler_maruyama", "sde", "fixed", 1, 1, False, "what SiT, REPA and U-REPA report: 250 steps"),
    SolverInfo(
        "stochastic_heun",
        "sde",
        "fixed",
        2,
        2,
        False,
        "a corrected euler_maruyama, of second order; not for a diffusion that is large near the data",
    ),
    SolverInfo(
        "heun-sit",
        "sde",
        "fixed",
        1,
        2,
        False,
        "SiT's Heun: a step's noise first, then heun; for its numbers, stochastic_heun is more accurate",
    ),
    SolverInfo(
        "ou",
        "sde",
        "fixed",
        1,
        1,
        False,
        "exact for a frozen data prediction; stable where the diffusion is large near the data",
    ),
    SolverInfo("ddpm", "ddpm", "fixed", 1, 1, False, "ancestral sampling of a noise predictor; DiT and DiC: 250 steps"),
    SolverInfo("ddim", "ddpm", "fixed", 1, 1, True, "deterministic sampling of a noise predictor over fewer steps"),
)
# The other choices of a sampler, with what a user wants to know of each.
DIFFUSION_FORMS = {
    "linear": "2 norm t: least noise near the data; REPA and U-REPA",
    "sigma": "2 norm sigma(t): like linear, following the path",
    "constant": "2 norm: as much noise near the data as elsewhere; with the solver ou and the last step tweedie",
    "sbdm": "that of the score-based diffusion with the path's marginals; very large near t = 1",
    "decreasing": "(1 - norm cos(pi t))^2 / 2: falls smoothly from 2 at the noise to 0 at the data",
    "increasing-decreasing": "2 norm sin(pi t)^2: none at either end",
}
LAST_STEPS = {
    "mean": "along the SDE's drift, without noise; REPA and U-REPA",
    "tweedie": "to the data prediction; the one to take on a VP path",
    "euler": "along the ODE's velocity",
    "none": "no last step: the SDE runs on to where its score can still be computed, and a trace of noise stays",
}
TIME_GRIDS = {
    "uniform": "equal steps in t",
    "shifted": "t / (1 - t) times a shift: above 1, more steps at high noise, for larger latents",
    "karras": "equal steps in a root of the ratio of noise to data: more steps at low noise (EDM)",
}
GUIDANCE_SCHEDULES = {
    "constant": "the same scale all over the interval",
    "linear": "from 1 at the interval's noisy end straight to the scale at its other end",
    "cosine": "the same, rising slowly at both ends",
}

_BY_NAME = {info.name: info for info in _SOLVERS}


def add_solver(info: SolverInfo) -> None:
    """List a solver of one's own. Raises UserError where another has its name."""
    if _BY_NAME.setdefault(info.name, info) != info:
        raise UserError(f"solver '{info.name}' is there already; choose another name")


def list_solvers(process: str | None = None) -> list[SolverInfo]:
    """All solvers, or those of one `process` ('ode', 'sde' or 'ddpm'), in the order in which to read about them."""
    return [info for info in _BY_NAME.values() if process in (None, info.process)]


def solver_info(name: str, process: str | None = None) -> SolverInfo:
    """The solver `name`. Raises UserError where there is none, or where it is not one of the `process` asked for."""
    info = _BY_NAME.get(name)
    if info is None:
        raise unknown_name("solver", name, [known.name for known in list_solvers(process)])
    if process not in (None, info.process):
        samplers = {"ode": "sample_ode", "sde": "sample_sde", "ddpm": "sample_ddpm"}
        raise UserError(
            f"'{name}' is a solver for {samplers[info.process]}; "
            f"{samplers[process]} takes {', '.join(known.name for known in list_solvers(process))}"
        )
    return info
