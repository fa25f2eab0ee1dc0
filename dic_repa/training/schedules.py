"""The learning rate over the steps: a rise at the start, and a schedule by name for what follows it.

A schedule is a callable (progress in [0, 1]) -> factor of the learning rate. Progress is 0 at the end of the warm-up
and 1 at the last step of the run.
"""

import math
from dataclasses import dataclass

import torch

from dic_repa.errors import UserError
from dic_repa.recipe.schema import Recipe
from dic_repa.registry import Registry

lr_schedules = Registry("learning-rate schedule", key="schedule.name")


@lr_schedules.register("constant")
@dataclass(frozen=True)
class Constant:
    """The same learning rate to the end."""

    def __call__(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class _Falling:
    final: float = 0.0

    def __post_init__(self):
        if not 0 <= self.final <= 1:
            raise UserError(f"final {self.final}: give the last step's share of the learning rate, from 0 to 1")

    def between(self, share: float) -> float:
        """From 1, where `share` is 1, to `final`, where it is 0."""
        return self.final + (1 - self.final) * share


@lr_schedules.register("cosine")
@dataclass(frozen=True)
class Cosine(_Falling):
    """Half a cosine from the learning rate to `final` of it: final + (1 - final) (1 + cos(pi progress)) / 2."""

    def __call__(self, progress: float) -> float:
        return self.between(0.5 + 0.5 * math.cos(math.pi * progress))


@lr_schedules.register("linear")
@dataclass(frozen=True)
class Linear(_Falling):
    """Straight from the learning rate to `final` of it: final + (1 - final) (1 - progress)."""

    def __call__(self, progress: float) -> float:
        return self.between(1 - progress)


@lr_schedules.register("wsd")
@dataclass(frozen=True)
class WSD(_Falling):
    """Warm-up, stable, decay: constant, and over the last `decay` of the steps straight to `final` of it.

    final + (1 - final) min(1, (1 - progress) / decay); the warm-up's steps are not among those that `decay` means.
    """

    decay: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise UserError(f"decay {self.decay}: give the share of the steps in which it falls, above 0 and up to 1")

    def __call__(self, progress: float) -> float:
        return self.between(min(1.0, (1 - progress) / self.decay))


class LearningRate:
    """The learning rate of each step of a recipe's run: `rate(step)`, with steps from 0.

    In the warm-up of W steps it is (step + 1) / W of the recipe's, and from there on the schedule's share of it.
    """

    def __init__(self, recipe: Recipe):
        self.rate, self.steps = recipe.optimizer.learning_rate, recipe.train.steps
        self.warmup_steps = recipe.schedule.warmup_steps
        self.schedule = lr_schedules.create(recipe.schedule.name, **recipe.schedule.options)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Let the optimizer's next step have the rate of `step`, which is returned."""
        rate = self(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.rate * ((step + 1) / self.warmup_steps)
        left = max(1, self.steps - 1 - self.warmup_steps)
        return self.rate * self.schedule(min(1.0, (step - self.warmup_steps) / left))
