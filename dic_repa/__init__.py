"""Train DiC with U-REPA, sample from it, and measure the samples.

from dic_repa import DiC, Recipe, train

The names load on first use, so that `import dic_repa` and the command line's help stay quick.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {"DiC": "dic_repa.models", "Recipe": "dic_repa.recipe.schema", "train": "dic_repa.training"}
__all__ = ["DiC", "Recipe", "__version__", "train"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'dic_repa' has no attribute '{name}'")


def __dir__():
    return sorted(__all__)
