"""What a denoiser is tried with: noise, times from noise to data as its objective gives them, rows y up to the null."""

from __future__ import annotations

import torch
from torch import Tensor

from dic_repa.conditions import ClassLabels
from dic_repa.recipe.build import build_objective
from dic_repa.sampling.load import Checkpoint

Inputs = tuple[Tensor, Tensor, Tensor]


def example_inputs(model: Checkpoint, rows: int) -> Inputs:
    """x (rows, C, H, W), t (rows,) from pure noise to data, y (rows, ...) up to the null; float32, on the CPU. Of
    average velocities t is (t, r) (rows, 2)."""
    generator = torch.Generator().manual_seed(rows)
    size, condition = model.recipe.data.size, model.denoiser.conditioned_on
    x = torch.randn(rows, model.denoiser.in_channels, size, size, generator=generator)
    if isinstance(condition, ClassLabels):
        y = torch.linspace(0, condition.count, rows).long()
    else:
        y = torch.randn(rows, *condition.shape, generator=generator)
        y[1:][-1:] = condition.null(y[-1:])[: rows - 1]
    seen: list[Inputs] = []

    def note(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((x, t, y))
        return torch.zeros_like(x)

    velocity = build_objective(model.recipe.objective).velocity_model(note)
    low, high = getattr(velocity, "time_range", (0.0, 1.0))
    t = torch.linspace(high, low, rows)
    velocity(x, torch.stack([t, t / 3], dim=1) if getattr(velocity, "two_times", False) else t, y)
    return seen[0]
