"""The labels of samples: in turn, at random, as often as in the training data, or those that the user names."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dic_repa.conditions import ClassLabels, Condition
from dic_repa.errors import UserError
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


def data_labels(recipe: Recipe, condition: Condition, num: int, classes: Sequence[int] | None = None) -> Tensor:
    """Labels (num,) that take the same `classes` as often as the training data does.

    Among the first n labels, for any n, each class comes as often as its share of n says, rounded up or down. A label
    depends on its index alone.

    Raises:
        UserError: it is not known how often they are in the data, or they are not in it.
    """
    choices = balanced_labels(recipe, condition, len(classes) if classes else max(1, condition.count), classes).unique()
    if choices.tolist() == [condition.count]:  # the null alone
        return choices.repeat(num)
    counts = condition.counts if isinstance(condition, ClassLabels) else None
    if counts is None:
        raise UserError(
            "how often each class is in the training data is not known, which sample.classes 'data' asks for: "
            "checkpoints of earlier versions do not say, and some data cannot; take --balanced-classes or "
            "--random-classes (in a recipe sample.classes)"
        )
    found = np.array([*counts, 0])[choices]
    if not found.any():
        raise UserError("none of these classes is in the training data, which sample.classes 'data' goes by")
    return choices[found > 0][_in_shares(found[found > 0], num)]


def _in_shares(counts: np.ndarray, num: int) -> np.ndarray:
    """Indices (num,) of `counts` (K,), each as often as its count is of their sum, spread evenly.

    In this order each class is within its quota at any time: of the classes that may come once more, the one that must
    do so first is next.
    """
    total = int(counts.sum())
    taken, due = np.zeros_like(counts), -(-total // counts)
    order = np.empty(min(num, total), dtype=np.int64)
    for n in range(len(order)):
        may = taken * total < counts * (n + 1)
        order[n] = k = np.where(may, due, 2 * total).argmin()
        taken[k] += 1
        due[k] = -(-(taken[k] + 1) * total // counts[k])
    return np.resize(order, num)  # after all of the data it begins anew


def draw_labels(
    recipe: Recipe, condition: Condition, settings: SampleSection, classes: Sequence[int] | None = None
) -> Tensor:
    """The labels (settings.num,) of samples of the `classes`, drawn as `settings.classes` says."""
    if settings.classes == "data":
        return data_labels(recipe, condition, settings.num, classes)
    if settings.classes == "random":
        return random_labels(recipe, condition, settings.num, classes, settings.seed)
    return balanced_labels(recipe, condition, settings.num, classes)
