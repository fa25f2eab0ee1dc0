"""The learning rate over the steps: a rise at the start, and a schedule by name for what follows it.

A schedule is a callable (progress in [0, 1]) -> factor of the learning rate. Progress is 0 at the end of the warm-up
and 1 at the last step of the run.
"""

import math
from collections.abc import Callable, Iterable

import torch

from dic_repa.errors import UserError
from dic_repa.recipe.schema import Recipe
from dic_repa.registry import Registry

lr_schedules = Registry("learning-rate schedule", key="schedule.name")


@lr_schedules.register("constant")
def constant() -> Callable[[float], float]:
    """The same learning rate to the end."""
    return lambda progress: 1.0


@lr_schedules.register("cosine")
def cosine(final: float = 0.0) -> Callable[[float], float]:
    """Half a cosine from the learning rate to `final` of it: final + (1 - final) (1 + cos(pi progress)) / 2."""
    return _falling(final, lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress))


@lr_schedules.register("linear")
def linear(final: float = 0.0) -> Callable[[float], float]:
    """Straight from the learning rate to `final` of it: final + (1 - final) (1 - progress)."""
    return _falling(final, lambda progress: 1 - progress)


@lr_schedules.register("wsd")
def wsd(final: float = 0.0, decay: float = 0.2) -> Callable[[float], float]:
    """Warm-up, stable, decay: constant, and over the last `decay` of the steps straight to `final` of it.

    final + (1 - final) min(1, (1 - progress) / decay); the warm-up's steps are not among those that `decay` means.
    """
    if not 0 < decay <= 1:
        raise UserError(f"decay {decay}: give the share of the steps in which it falls, above 0 and up to 1")
    return _falling(final, lambda progress: min(1.0, (1 - progress) / decay))


def _falling(final: float, share: Callable[[float], float]) -> Callable[[float], float]:
    """A fall from 1, where `share` of the progress is 1, to `final`, where it is 0."""
    if not 0 <= final <= 1:
        raise UserError(f"final {final}: give the last step's share of the learning rate, from 0 to 1")
    return lambda progress: final + (1 - final) * share(progress)


class LearningRate:
    """The learning rate of each step of a recipe's run: `rate(step)`, with steps from 0.

    In the warm-up of W steps it is (step + 1) / W of the recipe's, and from there on the schedule's share of it. Groups
    of parameters that an optimizer gives other rates keep their ratio.
    """

    def __init__(self, recipe: Recipe):
        self.rate, self.steps = recipe.optimizer.learning_rate, recipe.train.steps
        self.warmup_steps = recipe.schedule.warmup_steps
        self.schedule = lr_schedules.create(recipe.schedule.name, **recipe.schedule.options)

    def apply(self, optimizers: Iterable[torch.optim.Optimizer], step: int) -> float:
        """Let the optimizers' next step have the rate of `step`; the first one's is returned."""
        share = self.share(step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share  # the name that torch's schedulers use
        return self.rate * share

    def __call__(self, step: int) -> float:
        return self.rate * self.share(step)

    def share(self, step: int) -> float:
        """The rate of `step` as a share of the recipe's."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = max(1, self.steps - 1 - self.warmup_steps)
        return self.schedule(min(1.0, (step - self.warmup_steps) / left))
