"""Train DiC with U-REPA, sample from it, and measure the samples.

    from dic_repa import Aligner, DiC, Recipe, evaluate, load, load_recipe, train

The names load on first use, so that `import dic_repa` and the command line's help stay quick.
"""

from dic_repa.runtime.lazy import load_name

__version__ = "0.1.0"
"""The version of this package."""

_EXPORTS = {
    "Aligner": "alignment",
    "DiC": "models",
    "Recipe": "recipe",
    "evaluate": "evaluation.scores",
    "load": "sampling.load",
    "load_recipe": "recipe",
    "push": "publish",
    "train": "training",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    return load_name(__name__, _EXPORTS, name)


def __dir__():
    return sorted(__all__)
