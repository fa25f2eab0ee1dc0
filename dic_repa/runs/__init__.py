"""The folder of a training run, its checkpoints, and the list of runs."""

from dic_repa.runs.folder import RunFolder

__all__ = ["RunFolder"]
