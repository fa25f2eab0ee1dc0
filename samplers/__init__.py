"""ODE and SDE solvers as plain functions of a velocity, and guidance as a wrapper around the model."""

from dic_repa.runtime.lazy import load_name

# The names load on first use: listing the solvers for a help text needs no torch.
_MODULES = {
    "ddpm": ("BetaSchedule", "sample_ddpm"),
    "field": ("SampleInfo",),
    "grids": ("KarrasGrid", "ShiftedGrid", "UniformGrid", "resolution_shift", "time_grids"),
    "guidance": ("CFGPlusPlus", "Guidance"),
    "likelihood": ("Likelihood", "log_likelihood"),
    "noise": ("StepNoise", "initial_noise"),
    "ode": ("sample_ode",),
    "sde": ("sample_sde",),
    "solvers": ("SolverInfo", "list_solvers", "register_solver", "sample", "solver_info"),
}
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    return load_name(__name__, _EXPORTS, name)


def __dir__():
    return __all__
