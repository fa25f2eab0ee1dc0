"""Guidance as a wrapper around the model: it gives a velocity field, and no solver knows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dic_repa.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance inside an interval of time.

    v = v_null + scale (v_y - v_null) for low <= t <= high, and v_y elsewhere, at the price of one evaluation only.

    Raises UserError for an interval that is upside down or leaves [0, 1].
    """

    scale: float = 1.65
    interval: tuple[float, float] = (0.0, 0.7)

    def __post_init__(self):
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance interval ({low}, {high}): give (low, high) with 0 <= low <= high <= 1")

    def bind(self, model: Callable[[Tensor, Tensor, Tensor], Tensor], y: Tensor) -> GuidedField:
        """The guided velocity field of `model` (x, t, y) -> velocity for the labels `y` (B,).

        `model.num_classes` is its null class. Raises UserError where guidance needs a null class and there is none.
        """
        return GuidedField(self, model, y)


class GuidedField:
    """(x (B, ...), t (B,)) -> velocity; conditional and null predictions come from one doubled batch.

    Whether a step is guided is decided where it starts, for all of its evaluations (as the REPA authors' sampler does).
    """

    def __init__(self, guidance: Guidance, model: Callable, y: Tensor):
        if guidance.scale != 1 and getattr(model, "num_classes", None) is None:
            raise UserError(
                "guidance needs a model with a null class (`num_classes`); set the scale to 1 to do without"
            )
        self.guidance, self.model, self.y = guidance, model, y
        if (path := getattr(model, "path", None)) is not None:
            self.path = path
        self.time_range = getattr(model, "time_range", (0.0, 1.0))
        self.breakpoints = guidance.interval if guidance.scale != 1 else ()
        self.evaluations = 1
        self._step_start: float | None = None

    def begin_step(self, t: float | None, s: float | None) -> None:
        self._step_start = t

    def guided(self, t: float) -> bool:
        low, high = self.guidance.interval
        return self.guidance.scale != 1 and low <= t <= high

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        # A solver that announces its steps spares a GPU the wait for the value of t.
        start = self._step_start if self._step_start is not None else float(t[0])
        if not self.guided(start):
            self.evaluations = 1
            return self.model(x, t, self.y)
        self.evaluations = 2
        null = torch.full_like(self.y, self.model.num_classes)
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([self.y, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance.scale * (conditional - unconditional)
