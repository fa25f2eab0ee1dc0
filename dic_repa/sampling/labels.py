"""The labels of samples: in turn, at random, or those that the user names."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dic_repa.conditions import Condition
from dic_repa.recipe import Recipe, SampleSection

_LABELS = 3  # a random stream's number; dic_repa.samplers.noise has the others


def balanced_labels(recipe: Recipe, condition: Condition, num: int, classes: Sequence[int] | None = None) -> Tensor:
    """Labels (num,) that take the `classes` in turn, so that each comes equally often.

    By default all that the condition has, or the null for a model that was trained without labels.
    """
    if classes is None:
        without = not condition.count or recipe.train.label_dropout == 1
        classes = [condition.count] if without else range(condition.count)
    return torch.tensor(list(classes), dtype=torch.int64).repeat(num // len(classes) + 1)[:num]


def random_labels(
    recipe: Recipe, condition: Condition, num: int, classes: Sequence[int] | None = None, seed: int = 0
) -> Tensor:
    """Labels (num,) drawn from the same `classes`, each from (seed, its index) alone."""
    choices = balanced_labels(recipe, condition, len(classes) if classes else max(1, condition.count), classes).unique()
    drawn = []
    for index in range(num):
        bits = np.random.Philox(key=[index, seed & (2**64 - 1)], counter=[0, 0, 0, _LABELS])
        drawn.append(np.random.Generator(bits).integers(len(choices)))
    return choices[torch.tensor(drawn)]


def draw_labels(
    recipe: Recipe, condition: Condition, settings: SampleSection, classes: Sequence[int] | None = None
) -> Tensor:
    """The labels (settings.num,) of samples of the `classes`, balanced or random, as `settings.classes` says."""
    if settings.classes == "random":
        return random_labels(recipe, condition, settings.num, classes, settings.seed)
    return balanced_labels(recipe, condition, settings.num, classes)
