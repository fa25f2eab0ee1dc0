"""Training: the loop, the averaged weights, checkpoints, the run's folder and its randomness."""

from dic_repa.training.ema import EMA
from dic_repa.training.loop import train
from dic_repa.training.run_folder import RunFolder

__all__ = ["EMA", "RunFolder", "train"]
