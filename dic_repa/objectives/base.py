"""What all objectives share: the registry, a corrupted batch, and a trained denoiser as a velocity model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.paths import Path
from dic_repa.registry import Registry

objectives = Registry("objective")


def create_objective(name: str, **kwargs):
    """The objective filed under `name`, made with `kwargs`. Raises UserError for an unknown name."""
    return objectives.get(name)(**kwargs)


@dataclass(frozen=True)
class Noisy:
    """A corrupted batch: what the denoiser sees, what it should give, and what its error counts."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    target: Tensor  # (B, C, H, W)
    weight: Tensor  # (B,)


class VelocityModel:
    """A denoiser (x, t, y) -> prediction as (x, t, y) -> velocity, in x's dtype (at least float32).

    The denoiser runs in the dtype of its parameters; the time stays in float32 or better, since half precision cannot
    tell neighbouring steps apart. A `learn_sigma` denoiser's surplus channels are dropped.
    """

    def __init__(self, denoiser, path: Path, prediction: str):
        self.denoiser, self.path, self.prediction = denoiser, path, prediction
        self.time_range = path.safe_interval(prediction, "velocity")
        parameter = next(denoiser.parameters(), None) if isinstance(denoiser, torch.nn.Module) else None
        self.dtype = None if parameter is None else parameter.dtype

    @property
    def num_classes(self) -> int | None:
        """The null class; None where the denoiser has none."""
        return getattr(self.denoiser, "num_classes", None)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        dtype = self.dtype or x.dtype
        time_dtype = torch.promote_types(dtype, torch.float32)
        output = self.denoiser(x.to(dtype), t.to(time_dtype), y)
        state_dtype = torch.promote_types(x.dtype, torch.float32)
        value = prediction_channels(output, x.shape[1]).to(state_dtype)
        return self.path.convert(value, x.to(state_dtype), t.to(state_dtype), self.prediction, "velocity")


def prediction_channels(output: Tensor, channels: int) -> Tensor:
    """The first `channels` of a denoiser's output, which has that many or (with `learn_sigma`) twice as many."""
    if output.shape[1] not in (channels, 2 * channels):
        raise UserError(
            f"the denoiser gives {output.shape[1]} channels for {channels} of data: "
            f"build it with {channels} output channels, or {2 * channels} with learn_sigma"
        )
    return output[:, :channels]
