"""What a denoiser is conditioned on: class labels, nothing, a vector, or a sequence of tokens such as a text's.

Data sets have a `condition`, denoisers are `conditioned_on` one. It alone knows what stands for "no condition", the
null: training puts it into some rows, guidance moves away from it.

Rows to sample are named by number: label k is class k, or the k-th of the `examples` of a vector or token condition,
and label `count` is the null. So balanced and random draws, pictures and files are the same for all kinds.
"""

import contextlib
import copy
import io
import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.files.npz import read_array
from dic_repa.files.reading import read_file
from dic_repa.limits import check_limit

NULLS = ("zeros", "learnt")
MOST_COUNTED = 2**39  # samples in `counts`: times 10 million samples to draw, still an int64
MOST_EXAMPLES = 10  # taken from data that gives no examples


class Condition:
    """What all conditions have: one row of `shape` and `dtype` for each sample, and `count` rows to choose from."""

    kind: ClassVar[str]
    key: ClassVar[str] = "condition"  # of the row in a sample of the data
    choices: ClassVar[str] = "examples"  # what the rows to choose from are called
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    count: int = 0
    names: tuple[str, ...] = ()  # of the rows to choose from, for captions

    def null(self, y: Tensor) -> Tensor:
        """The null for each row of y (B, *shape), like y."""
        raise NotImplementedError

    def rows(self, labels: Tensor) -> Tensor:
        """The rows (N, *shape) that the `labels` (N,) name; a UserError for a label of neither a row nor the null."""
        wrong = labels[(labels < 0) | (labels > self.count)]
        if len(wrong):
            known = f"{self.describe_rows()}, and {self.count} for none"
            raise UserError(f"label {int(wrong[0])} is out of range: the model has {known}")
        return labels

    def label(self, name: str | int | None) -> int:
        """The label of a row to choose from, by its name or number; of none, the null."""
        if name is None:
            return self.count
        if name in self.names:
            return self.names.index(str(name))
        if str(name).isdecimal():
            return int(name)
        raise unknown_name("class", str(name), self.names)

    def describe(self) -> str:
        """In words, for cards: '10 classes'."""
        raise NotImplementedError

    def describe_rows(self) -> str:
        """The rows to choose from, in words: 'the classes 0 to 9'."""
        return f"the {self.choices} 0 to {self.count - 1}" if self.count else f"no {self.choices}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without names and examples, for `create_condition`: what a denoiser is built for."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """A denoiser's options for it: `num_classes`, and `condition` (see `to_dict`) if it is not classes."""
        return {"num_classes": 0, "condition": self.to_dict()}

    def drop(self, y: Tensor, mask: Tensor) -> Tensor:
        """y (B, *shape) with the null in the rows where `mask` (B,) is true."""
        return torch.where(mask.reshape(-1, *[1] * (y.ndim - 1)), self.null(y), y)

    def blank(self, batch: int) -> Tensor:
        """Rows (batch, *shape) of zeros, to run a denoiser for its shapes."""
        return torch.zeros(batch, *self.shape, dtype=self.dtype)

    def check(self, y: Tensor) -> None:
        """A UserError if y (B, *shape) is not a batch of this condition."""
        if y.shape[1:] != self.shape or y.dtype.is_floating_point != self.dtype.is_floating_point:
            raise UserError(
                f"the condition is {self.describe()}: {self.dtype} of shape (batch, *{self.shape}), "
                f"not {y.dtype} of shape {tuple(y.shape)}"
            )

    def with_examples(self, examples: Tensor | np.ndarray, names: Sequence[object] | None = None) -> "Condition":
        """The same condition with other rows (K, *shape) to choose from; a UserError if these are classes."""
        raise UserError(
            f"the model is conditioned on {self.describe()}, so rows of numbers cannot be given: name classes"
        )


class ClassLabels(Condition):
    """The number of a class, an int64 scalar; `num_classes` itself is the null class.

    `counts` says how often each class is in the training data; None if that is not known.
    """

    kind = "classes"
    key = "label"
    choices = "classes"
    dtype = torch.int64

    def __init__(
        self, num_classes: int, class_names: Sequence[object] | None = None, counts: Sequence[int] | None = None
    ):
        is_whole = isinstance(num_classes, numbers.Integral)  # numpy's too
        if not is_whole or num_classes < 0:
            raise UserError(f"the number of classes is a whole number from 0, not {num_classes!r}")
        check_limit("classes", num_classes, "the number of classes")
        self.num_classes = self.count = num_classes
        self.names = tuple(map(str, range(num_classes) if class_names is None else class_names))
        self.counts = None if counts is None else tuple(counts)
        if self.counts is not None:
            are_counts = len(self.counts) == num_classes and all(type(n) is int and n >= 0 for n in self.counts)
            if not are_counts or not 0 < sum(self.counts) < MOST_COUNTED:
                raise UserError(f"the counts of {num_classes} classes are as many whole numbers, not all 0")

    def null(self, y: Tensor) -> Tensor:
        return torch.full_like(y, self.num_classes)

    def describe(self) -> str:
        return f"{self.count} class{'es' * (self.count != 1)}"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options()}

    def options(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}


class NoCondition(ClassLabels):
    """Data without classes: every label is 0, which is the null."""

    kind = "none"

    def __init__(self) -> None:
        super().__init__(0)


class VectorCondition(Condition):
    """A vector of `dim` floats, such as the measurements that an image goes with or a pooled text embedding.

    Args:
        dim: numbers in a vector.
        null: 'zeros', or 'learnt': rows of NaN, which the denoiser replaces by a vector that it learns.
        examples: (K, dim), vectors to sample for unless others are named; some of the data's by default.
        names: K captions for them; 'example 0', 'example 1', ... by default.
    """

    kind = "vector"

    def __init__(self, dim: int, null: str = "learnt", examples=None, names: Sequence[object] | None = None):
        self._set((dim,), null, examples, names)

    def _set(self, shape: tuple[int, ...], null: str, examples, names: Sequence[object] | None) -> None:
        check_limit("number", math.prod(shape), f"the size of a {self.kind} condition")
        if min(shape) < 1 or null not in NULLS:
            raise UserError(f"a {self.kind} condition of {shape} with the null {null!r}: give {' or '.join(NULLS)}")
        self.shape, self.null_kind = shape, null
        self.examples = torch.zeros(0, *shape)
        if examples is not None:
            self.examples = torch.as_tensor(examples).to(self.dtype)
            self.check(self.examples)
        self.count = len(self.examples)
        self.names = tuple(map(str, (f"example {k}" for k in range(self.count)) if names is None else names))

    def null(self, y: Tensor) -> Tensor:
        return torch.full_like(y, math.nan if self.null_kind == "learnt" else 0.0)

    def rows(self, labels: Tensor) -> Tensor:
        examples = self.examples.to(labels.device)
        return torch.cat([examples, self.null(examples.new_zeros(1, *self.shape))])[super().rows(labels)]

    def describe(self) -> str:
        return f"vectors of {self.shape[0]} number{'s' * (self.shape[0] != 1)}"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "dim": self.shape[0], "null": self.null_kind}

    def with_examples(self, examples: Tensor | np.ndarray, names: Sequence[object] | None = None) -> "VectorCondition":
        other = copy.copy(self)
        other._set(self.shape, self.null_kind, examples, names)
        return other


class TokenCondition(VectorCondition):
    """A sequence of `length` tokens of `dim` floats, such as a text encoder's; examples are (K, length, dim)."""

    kind = "tokens"

    def __init__(
        self, length: int, dim: int, null: str = "learnt", examples=None, names: Sequence[object] | None = None
    ):
        self._set((length, dim), null, examples, names)

    def describe(self) -> str:
        return f"sequences of {self.shape[0]} tokens of {self.shape[1]} numbers"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "length": self.shape[0], "dim": self.shape[1], "null": self.null_kind}


def class_labels(
    num_classes: int, class_names: Sequence[object] | None = None, counts: Sequence[int] | None = None
) -> ClassLabels:
    """The condition of data with so many classes, none included."""
    return ClassLabels(num_classes, class_names, counts) if num_classes else NoCondition()


def count_classes(data) -> tuple[int, ...] | None:
    """How often each class is among the `labels` of a data set; None if it has none that can be counted."""
    labels = getattr(data, "labels", None)
    if isinstance(labels, Sequence | np.ndarray | Tensor) and len(labels):
        with contextlib.suppress(TypeError, ValueError):  # these are no class numbers
            counts = np.bincount(np.asarray(labels), minlength=data.num_classes)
            return tuple(counts.tolist()) if len(counts) == data.num_classes else None
    return None


def create_condition(num_classes: int = 0, condition: dict[str, Any] | None = None) -> Condition:
    """The condition whose `options` these are; a UserError for an unknown kind or other keys than its kind has."""
    if condition is None:
        return class_labels(num_classes)
    known = (ClassLabels, NoCondition, VectorCondition, TokenCondition)
    kinds: dict[str, Callable[..., Condition]] = {kind.kind: kind for kind in known}
    try:
        return kinds[condition["kind"]](**{key: value for key, value in condition.items() if key != "kind"})
    except (KeyError, TypeError):
        raise UserError(f"{condition} is not a condition; its kind is one of {', '.join(kinds)}") from None


def condition_of_data(data) -> Condition:
    """A data set's `condition`, or else its classes'. One without examples gets a few, spread over the data."""
    condition = getattr(data, "condition", None)
    if condition is None:
        return class_labels(data.num_classes, getattr(data, "class_names", None), count_classes(data))
    if isinstance(condition, VectorCondition) and not condition.count and len(data):
        places = torch.linspace(0, len(data) - 1, min(MOST_EXAMPLES, len(data))).round().long().tolist()
        return condition.with_examples(torch.stack([data[place][condition.key] for place in places]))
    return condition


def condition_of_model(model) -> Condition | None:
    """What a denoiser is `conditioned_on`, or else the classes of its `num_classes`; None if it has neither."""
    condition, num_classes = getattr(model, "conditioned_on", None), getattr(model, "num_classes", None)
    return condition if condition is not None or num_classes is None else class_labels(num_classes)


def null_of(model) -> Callable[[Tensor], Tensor] | None:
    """The null as a function of the rows y (B, ...): a model's own `null`, or its condition's."""
    condition = condition_of_model(model)
    return getattr(model, "null", None) or (condition.null if condition else None)


def read_examples(condition: Condition, file: str | Path) -> Condition:
    """`condition` with the rows of an .npy file, (K, *shape) floats, to choose from in place of its examples."""
    try:
        content = read_file(file)
        rows = read_array(io.BytesIO(content), len(content), str(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not an array of numpy's format .npy ({error})") from None
    if not (rows.ndim and rows.dtype.kind == "f" and len(rows)) or not np.isfinite(rows).all():
        raise UserError(f"{file} must hold finite floats, a row for each {condition.kind} to sample for")
    return condition.with_examples(rows)
