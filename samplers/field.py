"""What a solver integrates: a velocity field with one time for the whole batch and its evaluations counted.

It is any callable (x (B, ...), t (B,)) -> velocity, which may have attributes that tell a solver more:

    path                 the path that it belongs to (the default of a sampler's `path`)
    two_times            whether t may be (t, s) (B, 2), for the average velocity on the way from t to s
    time_range           (t_min, t_max), outside which it may not be evaluated
    breakpoints          times at which it jumps; adaptive solvers stop and start there
    begin_step(t, s)     called when a step from time t to time s starts; s is None if the solver chooses it,
                         and both are None when the integration has ended
    evaluations          how many network evaluations the last call made (1 without this attribute)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant, LinearPath, path_of

VelocityFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SampleInfo:
    """How a sample was made: network evaluations per sample, and the states (B, ...) at `times`, both ends included."""

    nfe: int
    times: list[float]
    states: list[Tensor]


class Field:
    """`velocity_fn` as solvers call it: `field(x, t)` with one t for all rows, a float or a scalar tensor, or (t, s).

    `nfe` counts network evaluations per sample.
    """

    def __init__(self, velocity_fn: VelocityFn, path: Interpolant | None = None):
        self.velocity_fn = velocity_fn
        self.path = path or path_of(velocity_fn) or LinearPath()
        self.breakpoints: tuple[float, ...] = tuple(getattr(velocity_fn, "breakpoints", ()))
        self.nfe = 0

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        v = self.velocity_fn(x, _times(x, t))
        self.nfe += getattr(self.velocity_fn, "evaluations", 1)
        return v.to(x.dtype)

    def average(self, x: Tensor, t: float, s: float) -> Tensor:
        """The average velocity on the way from x at the time t to the time s; a UserError of a field without it."""
        if not getattr(self.velocity_fn, "two_times", False):
            raise UserError(
                "solver 'meanflow' needs a model of average velocities, trained with the objective meanflow or "
                "improved-meanflow; take heun or dopri5"
            )
        return self(x, x.new_tensor([t, s]))

    def begin_step(self, t: float | None, s: float | None) -> None:
        announce = getattr(self.velocity_fn, "begin_step", None)
        if announce is not None:
            announce(t, s)

    def run(
        self, step: Callable[[int, Tensor, float, float], Tensor], x: Tensor, times: Sequence[float], every: bool
    ) -> list[Tensor]:
        """x (B, ...) and its states after the steps `step(index, x, t, s)`: all of them, or the last only."""
        states = [x]
        for index, (t, s) in enumerate(pairwise(times)):
            self.begin_step(t, s)
            states.append(step(index, states[-1], t, s))
            if not every:
                del states[1:-1]
        return states

    def time_range(self, *targets: str) -> tuple[float, float]:
        """Where the velocity is finite and can be converted to each of the `targets`."""
        ranges = [self.path.safe_interval("velocity", target) for target in ("velocity", *targets)]
        ranges.append(getattr(self.velocity_fn, "time_range", (0.0, 1.0)))
        return max(low for low, _ in ranges), min(high for _, high in ranges)

    def convert(self, v: Tensor, x: Tensor, t: float, target: str) -> Tensor:
        """The velocity `v` at (x, t) as `target`: 'score', 'noise' or 'data'."""
        return self.path.convert(v, x, _times(x, t), "velocity", target)

    def data(self, x: Tensor, t: float) -> Tensor:
        """The data prediction at (x, t)."""
        return self.convert(self(x, t), x, t, "data")


class Watched:
    """A velocity field that tells `watch(x, t (B,), value)` of each evaluation; all else is as `field` has it."""

    def __init__(self, field: VelocityFn, watch: Callable[[Tensor, Tensor, Tensor], None]):
        self.field, self.watch = field, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.field, name)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        value = self.field(x, t)
        self.watch(x, t if t.ndim == 1 else t[:, 0], value)
        return value


def _times(x: Tensor, t: float | Tensor) -> Tensor:
    """`t` (B,), of a pair (B, 2), expanded from one value, so that a denoiser can see that the rows share it."""
    one = t.to(x) if isinstance(t, Tensor) else x.new_full((), t)
    return one.expand(len(x), *one.shape)


def as_state(noise: Tensor) -> Tensor:
    """A solver's state: `noise` in its own dtype, at least float32."""
    return noise.to(torch.promote_types(noise.dtype, torch.float32))
