"""ODE and SDE solvers as plain functions of a velocity, and guidance as a wrapper around the model."""

from __future__ import annotations

from dic_repa.runtime.lazy import load_name

# The names load on first use: listing the solvers for a help text needs no torch.
_EXPORTS = {
    "BetaSchedule": "ddpm",
    "CFGPlusPlus": "guidance",
    "Guidance": "guidance",
    "KarrasGrid": "grids",
    "Likelihood": "likelihood",
    "SampleInfo": "field",
    "ShiftedGrid": "grids",
    "SolverInfo": "solvers",
    "StepNoise": "noise",
    "UniformGrid": "grids",
    "time_grids": "grids",
    "initial_noise": "noise",
    "list_solvers": "solvers",
    "log_likelihood": "likelihood",
    "register_solver": "solvers",
    "sample": "solvers",
    "sample_ddpm": "ddpm",
    "sample_ode": "ode",
    "sample_sde": "sde",
    "solver_info": "solvers",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    return load_name(__name__, _EXPORTS, name)


def __dir__():
    return __all__
