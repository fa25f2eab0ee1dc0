"""Training: the loop, the averaged weights, checkpoints, the run's folder, its randomness, and what may go wrong."""

from dic_repa.training.ema import EMA, PowerEMA
from dic_repa.training.loop import train
from dic_repa.training.preemption import Preempted
from dic_repa.training.run_folder import RunFolder

__all__ = ["EMA", "PowerEMA", "Preempted", "RunFolder", "train"]
