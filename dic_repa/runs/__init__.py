"""The folder of a training run: checkpoints, manifest, lock, and the list of runs."""

from dic_repa.runs.folder import RunFolder

__all__ = ["RunFolder"]
