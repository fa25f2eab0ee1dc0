"""What all objectives share: what they are given and give, and a trained denoiser as a velocity model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.conditions import null_of
from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant
from dic_repa.registry import Registry
from dic_repa.samplers.ddpm import split_output

objectives = Registry("objective", modules=["dic_repa.objectives.*"], key="objective.name")


@dataclass
class Batch:
    """What one pass of a training step gives an objective."""

    x: Tensor  # (B, C, H, W), the data
    y: Tensor  # (B, ...), what it is conditioned on; some of it is dropped
    draws: dict[str, Tensor]  # these rows of what the objective's `draw` gave, each (B, ...)
    averaged: nn.Module | None = None  # the denoiser with averaged weights, (x, t, y) -> prediction
    whole: Batch | None = None  # all images of the step with their draws, if the objective has `whole_batch = True`


@dataclass
class ObjectiveOutput:
    """What an objective gives for one pass."""

    loss: Tensor  # (B,), float32
    time: Tensor  # (B,), in [0, 1]: when the projections were taken
    projections: list[Tensor]  # one (B, N, D) for each alignment, from the run of the model that they belong to
    others: dict[str, Tensor] = field(default_factory=dict)  # further losses (B,) to add, by their names in the log
    told: dict[str, Tensor] = field(default_factory=dict)  # numbers (B,) for the log alone


class Denoising:
    """An objective of one noisy state and one run of the model: `corrupt` the data, weigh the error by `loss`.

    `earlier(t, interval)`, which self-alignment needs, moves the times t (B,) of `draw` towards the data by `interval`
    (B,) in [0, 1].
    """

    earlier: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, model, batch: Batch) -> ObjectiveOutput:
        """Run the `AlignedDenoiser` `model` on the batch. A middle head has the same loss, times its weight."""
        noisy = self.corrupt(batch.x, **batch.draws)
        out = model(noisy.x_t, noisy.t, batch.y, noisy.unit_time)
        others = {} if out.middle is None else {"middle": out.middle_weight * self.loss(out.middle, noisy)}
        return ObjectiveOutput(self.loss(out.prediction, noisy), noisy.unit_time, out.projections, others)

    @property
    def trains_middle(self) -> bool:
        """Whether a denoiser's middle head is trained: not by an objective that runs the model in its own way."""
        return type(self).__call__ is Denoising.__call__

    def with_less_noise(self, batch: Batch, interval: Tensor) -> Noisy:
        """The batch's data with the same noise, at times that are nearer to the data by `interval` (B,) in [0, 1]."""
        return self.corrupt(batch.x, self.earlier(batch.draws["t"], interval), batch.draws["noise"])

    def corrupt(self, x: Tensor, t: Tensor, noise: Tensor) -> Noisy:
        """The noisy state of data x (B, C, H, W) at the times t (B,), and what the denoiser should make of it."""
        raise NotImplementedError

    def loss(self, prediction: Tensor, noisy: Any) -> Tensor:
        """What the error of each image's prediction counts, (B,)."""
        raise NotImplementedError


def check_middle_head(denoiser: Any, objective: Any) -> None:
    """A UserError if `denoiser` has a middle head and `objective` would not train it."""
    trained = isinstance(objective, Denoising) and objective.trains_middle
    if getattr(denoiser, "middle_head", None) is not None and not trained:
        raise UserError(
            f"model.options.middle_head: the objective {type(objective).__name__} does not train it; take "
            "flow-matching, or leave middle_head out"
        )


@dataclass(frozen=True)
class Noisy:
    """A corrupted batch: what the denoiser sees, what it should give, and what its error counts."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,), what the denoiser embeds
    target: Tensor  # (B, C, H, W)
    weight: Tensor  # (B,)

    @property
    def unit_time(self) -> Tensor:
        """The time in [0, 1], (B,), whatever `t` counts in."""
        return self.t


def once(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """`function` of the times t, (B,) or (B, 2). If t is expanded from one row, as samplers give it, so is the result:
    then a denoiser sees that the rows share their time, and embeds one."""
    return function(t[:1]).expand(t.shape) if t.stride(0) == 0 else function(t)


def run_denoiser(denoiser, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The output of `denoiser` (x, t, y), run in the dtype of its parameters, in x's dtype (at least float32). The time
    stays in float32 or better, since half precision cannot tell neighbouring steps apart."""
    parameter = next(denoiser.parameters(), None) if isinstance(denoiser, torch.nn.Module) else None
    dtype = x.dtype if parameter is None else parameter.dtype
    output = denoiser(x.to(dtype), once(lambda t: t.to(torch.promote_types(dtype, torch.float32)), t), y)
    return output.to(torch.promote_types(x.dtype, torch.float32))


class VelocityModel:
    """A denoiser (x, t, y) -> prediction as (x, t, y) -> velocity, in x's dtype (at least float32), without the surplus
    channels of `learn_sigma` or a middle head.

    `with_middle(x, t, y)` gives the velocity, and that of the middle head, from one run of the denoiser; it is None for
    a denoiser without one.
    """

    def __init__(self, denoiser, path: Interpolant, prediction: str):
        self.with_middle = self._with_middle if getattr(denoiser, "middle_head", None) is not None else None
        self.denoiser, self.path, self.prediction = denoiser, path, prediction
        self.null = null_of(denoiser)  # for no condition; None if it has none
        self.time_range = path.safe_interval(prediction, "velocity")

    def embedded_time(self, t: Tensor) -> Tensor:
        """What the denoiser embeds at the time t."""
        return t

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._velocity(self._run(x, t, y)[:, : x.shape[1]], x, t)

    def _with_middle(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        own, middle = self._run(x, t, y).chunk(2, dim=1)
        return self._velocity(own, x, t), self._velocity(middle, x, t)

    def _run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output = run_denoiser(self.denoiser, x, once(self.embedded_time, t), y)
        split_output(output, x.shape[1])  # tells of other channels
        return output

    def _velocity(self, value: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.path.convert(value, x.to(value.dtype), t.to(value.dtype), self.prediction, "velocity")
