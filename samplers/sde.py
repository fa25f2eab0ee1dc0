"""Sampling by the reverse SDE dx = (v - w/2 s) dt + sqrt(w) dW, whose marginals are the ODE's for every w(t) >= 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.paths import Path
from dic_repa.samplers.field import Field, VelocityFn, as_state
from dic_repa.samplers.noise import StepNoise


@torch.no_grad()
def sample_sde(
    velocity_fn: VelocityFn,
    noise: Tensor,
    path: Path | None = None,
    solver: str = "euler_maruyama",
    steps: int = 250,
    noise_fn: Callable[[int, Tensor], Tensor] | None = None,
    last_step_size: float = 0.04,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Integrate from `noise` (B, ...) at t = 1 to data at t = 0 with the diffusion w(t) = 2t.

    `steps` counts all evaluations: steps - 1 Euler-Maruyama steps on a uniform grid from 1 to `last_step_size`, then
    one step along the drift, without noise, to 0. `noise_fn(step, like)` gives the standard normal noise of a step; by
    default it depends on (`seed`, sample index, step) only, `indices` being the samples' indices (0 to B - 1).

    Returns (B, ...) in the dtype of `noise`, at least float32. Raises UserError for less than one step.
    """
    if solver != "euler_maruyama":
        raise UserError(f"unknown solver '{solver}'; known: euler_maruyama")
    if steps < 1:
        raise UserError(f"steps={steps}: give a step count of at least 1")
    field = Field(velocity_fn, path)
    noise_fn = noise_fn or StepNoise(seed, range(len(noise)) if indices is None else indices)
    x = as_state(noise)
    high = field.time_range("score")[1]
    times = torch.linspace(high, last_step_size, steps, dtype=torch.float64).tolist() if steps > 1 else [high]
    for index, (t, s) in enumerate(pairwise(times)):
        w = 2 * t
        x = x + (s - t) * _drift(field, x, t, s, w) + (w * (t - s)) ** 0.5 * noise_fn(index, x)
    t = times[-1]
    x = x - t * _drift(field, x, t, 0.0, 2 * t)
    field.begin_step(None, None)
    return x


def _drift(field: Field, x: Tensor, t: float, s: float, w: float) -> Tensor:
    field.begin_step(t, s)
    v = field(x, t)
    return v - 0.5 * w * field.convert(v, x, t, "score")
