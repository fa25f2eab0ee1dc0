"""Which classes are sampled: in turn, at random, or those that the user names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.recipe import Recipe, SampleSection

_LABELS = 3  # the purpose of a random number, beside those of dic_repa.samplers.noise


def balanced_labels(recipe: Recipe, num_classes: int, num: int, classes: Sequence[int] | None = None) -> Tensor:
    """Labels (num,) that go round the `classes`, so that each is drawn as often as the others.

    By default all classes; only the null class for a model that was trained without labels (data without classes, or
    label dropout 1), which knows no other.
    """
    if classes is None:
        without = not num_classes or recipe.train.label_dropout == 1
        classes = [num_classes] if without else range(num_classes)
    return torch.tensor(list(classes), dtype=torch.int64).repeat(num // len(classes) + 1)[:num]


def random_labels(
    recipe: Recipe, num_classes: int, num: int, classes: Sequence[int] | None = None, seed: int = 0
) -> Tensor:
    """Labels (num,) drawn from the same `classes`, each from (seed, its index) alone."""
    choices = balanced_labels(recipe, num_classes, len(classes) if classes else max(1, num_classes), classes).unique()
    drawn = []
    for index in range(num):
        # A purpose of its own in the counter, beside those of dic_repa.samplers.noise.
        bits = np.random.Philox(key=[index, seed & (2**64 - 1)], counter=[0, 0, 0, _LABELS])
        drawn.append(np.random.Generator(bits).integers(len(choices)))
    return choices[torch.tensor(drawn)]


def draw_labels(
    recipe: Recipe, num_classes: int, settings: SampleSection, classes: Sequence[int] | None = None
) -> Tensor:
    """The labels (settings.num,) of samples of the `classes`, balanced or random, as `settings.classes` says."""
    if settings.classes == "random":
        return random_labels(recipe, num_classes, settings.num, classes, settings.seed)
    return balanced_labels(recipe, num_classes, settings.num, classes)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """A UserError for a label that is neither a class nor the null class."""
    wrong = labels[(labels < 0) | (labels > num_classes)]
    if len(wrong):
        raise UserError(
            f"label {int(wrong[0])} is out of range: the model has {classes_in_words(num_classes)}, "
            f"and {num_classes} for none"
        )


def classes_in_words(num_classes: int) -> str:
    """'the classes 0 to 9', or 'no classes'."""
    return f"the classes 0 to {num_classes - 1}" if num_classes else "no classes"
