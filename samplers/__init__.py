"""ODE and SDE solvers as plain functions of a velocity, and guidance as a wrapper around the model."""

from __future__ import annotations

from importlib import import_module

# The names load on first use: listing the solvers for a help text needs no torch.
_EXPORTS = {
    "Guidance": "guidance",
    "StepNoise": "noise",
    "initial_noise": "noise",
    "sample_ode": "ode",
    "sample_sde": "sde",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__():
    return __all__
