"""Guidance as a wrapper around the model: the result is a velocity field like any other to a solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dic_repa.conditions import null_of
from dic_repa.errors import UserError
from dic_repa.interpolants import LinearPath, expand_as, path_of
from dic_repa.registry import Registry

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
guidances = Registry("guidance", key="sample.guidance.kind")
# functions (progress) -> share of the scale, both from 0 at the interval's noisy end to 1 at its other end
guidance_schedules = Registry("guidance schedule", key="sample.guidance.schedule", functions=True)


@guidance_schedules.register("constant")
def _constant(progress: Tensor) -> Tensor:
    """The same scale all over the interval."""
    return torch.ones_like(progress)


@guidance_schedules.register("linear")
def _linear(progress: Tensor) -> Tensor:
    """From 1 at the interval's noisy end straight to the scale at its other end."""
    return progress


@guidance_schedules.register("cosine")
def _cosine(progress: Tensor) -> Tensor:
    """From 1 to the scale, rising slowly at both ends."""
    return 0.5 - 0.5 * torch.cos(math.pi * progress)


@guidances.register("cfg")
@dataclass(frozen=True)
class Guidance:
    """Guidance inside an interval of time (Kynkäänniemi et al. 2024); only there it costs a second evaluation.

    v = u + g(t) (v_y - u) for low <= t <= high and v = v_y elsewhere. u is the prediction for the null condition
    (classifier-free guidance), or that of a weaker model for the same one (autoguidance, Karras et al. 2024).

    Internal guidance (Zhou et al., arXiv 2512.24176) puts m + w (v - m) in place of each prediction v of the model, v_y
    and u alike, with the m that its middle head gives in the same evaluation; it costs none.

    Args:
        scale: g at its full size; 1 is no guidance.
        interval: (low, high) within [0, 1].
        channels: guide only that many first channels (3 in DiT); the others are v_y's. None: all.
        schedule: 'constant'; 'linear' and 'cosine' let g rise from 1 at `high` to `scale` at `low`.
        rescale: share, from 0 to 1, to which v is brought to v_y's standard deviation (Lin et al. 2024, eq. 15-16).
        doubled: predict v_y and u in one batch of twice the size, which is faster, or one after the other (False), with
            half the memory. None: in one, unless a GPU's memory is too small for it.
        internal: w; 1 is no internal guidance. The paper has 1.4.
        internal_interval: (low, high), when it acts.

    Raises UserError for values out of these ranges and for an unknown schedule.
    """

    scale: float = 1.65
    interval: tuple[float, float] = (0.0, 0.7)
    channels: int | None = None
    schedule: str = "constant"
    rescale: float = 0.0
    doubled: bool | None = None
    internal: float = 1.0
    internal_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        for low, high in (self.interval, self.internal_interval):
            if not 0 <= low <= high <= 1:
                raise UserError(f"guidance interval ({low}, {high}): give (low, high) with 0 <= low <= high <= 1")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"guidance on {self.channels} channels: give at least 1, or none for all channels")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance rescale {self.rescale}: give a share between 0 and 1")
        guidance_schedules.find(self.schedule)

    @property
    def active(self) -> bool:
        """Whether it does anything at all, beside internal guidance."""
        return self.scale != 1

    def bind(self, model: Model, y: Tensor, weak_model: Model | None = None) -> GuidedField:
        """The guided velocity field of `model` (x, t, y) -> velocity for the conditions `y` (B, ...), such as labels.

        Its null is `model.null(y)`, or else the class `model.num_classes`; a UserError if it has neither. A
        `weak_model` (x, t, y) -> velocity replaces the prediction for the null, which is then not needed.
        """
        return GuidedField(self, model, y, weak_model)

    def scale_at(self, t: Tensor, step: tuple[float, float | None] | None, path) -> Tensor | float:
        """g at the times `t` (B,) within the interval, in a step from and to the times `step`."""
        low, high = self.interval
        if self.schedule == "constant":
            return self.scale
        progress = ((high - t) / max(high - low, 1e-12)).clamp(0, 1)
        return 1 + (self.scale - 1) * guidance_schedules.find(self.schedule)(progress)


@guidances.register("cfg++")
@dataclass(frozen=True)
class CFGPlusPlus(Guidance):
    """CFG++ (Chung et al. 2024), with a scale in [0, 1]: the guided data prediction gets the unguided noise back.

    Their DDIM step from t to s, alpha_s x_g + sigma_s eps_null with x_g = x_null + scale (x_y - x_null), equals a step
    of classifier-free guidance with g = scale / (1 - (sigma_s alpha_t) / (alpha_s sigma_t)). As g depends on the step,
    a solver of fixed steps is needed; with an adaptive one this raises UserError. DDIM's steps are those of euler on
    the linear path. The path is the model's `path`, else the linear one.
    """

    scale: float = 0.6
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.scale <= 1 or self.schedule != "constant":
            raise UserError(f"CFG++ with scale {self.scale}: give a scale between 0 and 1, and no schedule for it")

    @property
    def active(self) -> bool:
        return True

    def scale_at(self, t: Tensor, step: tuple[float, float | None] | None, path) -> float:
        if step is None or step[1] is None:
            raise UserError("CFG++ depends on the step's size: take a solver of fixed steps, for example euler")
        c = path.coefficients(torch.tensor(step, dtype=torch.float64))
        shrink = (c.sigma[1] * c.alpha[0] / (c.alpha[1] * c.sigma[0])).item()
        return self.scale / (1 - shrink)


class InternalModel:
    """A model (x, t, y) -> velocity guided away from its own middle head, in one evaluation: m + scale (v - m).

    A UserError if the model has no `with_middle(x, t, y)`, which gives v and m.
    """

    def __init__(self, model: Any, scale: float):
        with_middle = getattr(model, "with_middle", None)
        if with_middle is None:
            raise UserError(
                "internal guidance needs a denoiser with a middle head (model.options.middle_head); set `internal` to "
                "1 to do without"
            )
        self.with_middle: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = with_middle
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        velocity, middle = self.with_middle(x, t, y)
        return middle + self.scale * (velocity - middle)


def _prepared(model: Model, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The prediction v of `model` as it enters guidance: a model trained to predict something else than the velocity of
    its data has a `before_guidance` (v, x, t) that undoes this."""
    before = getattr(model, "before_guidance", None)
    return before(v, x, t) if before else v


class GuidedField:
    """(x (B, C, ...), t (B,) or (B, 2), all rows the same) -> velocity.

    A step's start decides whether all its evaluations are guided (as in the REPA authors' sampler). Channels that x
    does not have are never guided.
    """

    def __init__(self, guidance: Guidance, model: Model, y: Tensor, weak_model: Model | None = None):
        self.guidance, self.y, self.weak_model = guidance, y, weak_model
        self.plain = model
        self.internal = InternalModel(model, guidance.internal) if guidance.internal != 1 else model
        null = null_of(model)
        if guidance.active and weak_model is None and null is None:
            raise UserError(
                "guidance needs a model with a null class (`num_classes`); set the scale to 1 to do without"
            )
        self.null = null(y) if null else y
        self._pair_of_conditions = torch.cat([y, self.null]) if guidance.active and weak_model is None else y
        self.path, self.two_times = path_of(model), getattr(model, "two_times", False)
        self.time_range = getattr(model, "time_range", (0.0, 1.0))
        inside = guidance.interval if guidance.active else ()
        self.breakpoints = (*inside, *(guidance.internal_interval if guidance.internal != 1 else ()))
        self.evaluations = 1
        self.doubled = guidance.doubled is not False  # becomes False where the doubled batch did not fit
        self._step: tuple[float, float | None] | None = None

    def begin_step(self, t: float | None, s: float | None) -> None:
        self._step = None if t is None else (t, s)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        # A solver that announces its steps spares a GPU the wait for the value of t.
        start = self._step[0] if self._step is not None else float(t.flatten()[0])
        low, high = self.guidance.internal_interval
        model = self.internal if low <= start <= high else self.plain
        low, high = self.guidance.interval
        if not (self.guidance.active and low <= start <= high):
            self.evaluations = 1
            return model(x, t, self.y)
        self.evaluations = 2
        strong, weak = self._pair(model, x, t)
        strong, weak = _prepared(self.plain, strong, x, t), _prepared(self.weak_model or self.plain, weak, x, t)
        guided = min(self.guidance.channels or x.shape[1], x.shape[1])
        scale = self.guidance.scale_at(t if t.ndim == 1 else t[:, 0], self._step, self.path or LinearPath())
        if isinstance(scale, Tensor):
            scale = expand_as(scale, x)
        v = weak[:, :guided] + scale * (strong[:, :guided] - weak[:, :guided])
        if self.guidance.rescale:
            ratio = strong[:, :guided].flatten(1).std(1) / v.flatten(1).std(1)
            v = v * expand_as(self.guidance.rescale * ratio + 1 - self.guidance.rescale, v)
        return v if guided == strong.shape[1] else torch.cat([v, strong[:, guided:]], dim=1)

    def _pair(self, model: Model, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction to strengthen and the one to move away from."""
        if self.weak_model is not None:
            return model(x, t, self.y), self.weak_model(x, t, self.y)
        if self.doubled:
            try:
                times = t[:1].expand(2 * len(t), *t.shape[1:])  # all the same: the model embeds one
                strong, weak = model(torch.cat([x, x]), times, self._pair_of_conditions).chunk(2)
                return strong, weak
            except torch.OutOfMemoryError:
                if self.guidance.doubled:
                    raise
                self.doubled = False
        return model(x, t, self.y), model(x, t, self.null)
