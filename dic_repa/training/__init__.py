"""Training: the loop, the averaged weights, checkpoints, its randomness, and what may go wrong.

The names load on first use.
"""

from importlib import import_module

_EXPORTS = {
    "EMA": "ema",
    "PowerEMA": "ema",
    "Preempted": "preemption",
    "train": "loop",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"dic_repa.training.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'dic_repa.training' has no attribute '{name}'")


def __dir__():
    return sorted(__all__)
