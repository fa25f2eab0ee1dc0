"""Training: the loop, the averaged weights, checkpoints, its randomness, and what may go wrong.

The names load on first use.
"""

from dic_repa.runtime.lazy import load_name

_EXPORTS = {
    "EMA": "ema",
    "PowerEMA": "ema",
    "Preempted": "preemption",
    "train": "loop",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    return load_name(__name__, _EXPORTS, name)


def __dir__():
    return sorted(__all__)
