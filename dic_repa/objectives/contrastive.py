"""Contrastive flow matching: towards a sample's own velocity, and away from another sample's (arXiv 2506.05350)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant
from dic_repa.objectives.base import Batch, Noisy, ObjectiveOutput, VelocityModel, objectives
from dic_repa.objectives.flow_matching import FlowMatching


@dataclass(frozen=True)
class ContrastiveNoisy(Noisy):
    away: Tensor  # (B, C, H, W), what the denoiser would give if x_t belonged to the other pair


@objectives.register("contrastive-flow-matching")
class ContrastiveFlowMatching(FlowMatching):
    """Flow matching, and away from another sample's velocity (Stoica et al. 2025, DeltaFM).

    |v - v_i|^2 - contrast |v - v_j|^2 (arXiv 2506.05350, eq. 6), for each image the mean over its numbers. v_j is the
    velocity of another sample of the whole step's batch, with its own noise, at this one's time. As in the authors'
    code it is any other sample, of the same class too, and images whose label was dropped count alike.

    Its minimum is (E[v_i | x_t] - contrast v_mean) / (1 - contrast), with v_mean the velocity of the data's mean. Under
    guidance the samplers undo that, as the paper does: both predictions become (1 - contrast) v + contrast v_mean. What
    is not guided stays as it is. v is whatever the weighting counts the error of, by default what is predicted.

    Args:
        contrast: lambda, from 0 to below 1.

    The others are those of flow-matching. Raises UserError for another contrast, and for a step of one image.
    """

    whole_batch = True  # a training step gives `Batch.whole`
    trains_middle = True
    data_mean: Tensor | None = None  # (C, H, W), of the training data; None: guidance is not corrected

    def __init__(
        self,
        contrast: float = 0.05,
        path: Interpolant | str | dict = "linear",
        time="uniform",
        prediction: str = "velocity",
        weighting="none",
        shift: float | str = 1.0,
    ):
        super().__init__(path, time, prediction, weighting, shift)
        if not 0 <= contrast < 1:
            raise UserError(f"contrast {contrast}: give a number from 0 to below 1; at 1 the loss has no minimum")
        self.contrast = contrast
        self.unit = self.weighting.unit or prediction
        low, high = self.path.safe_interval(self.unit, prediction)
        self.time_range = max(low, self.time_range[0]), min(high, self.time_range[1])

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """As `FlowMatching.draw`, then `other` (B,): which sample of the whole batch each is contrasted with."""
        draws, count = super().draw(shape, generator, device), shape[0]
        steps = torch.randint(1, max(count, 2), (count,), generator=generator, device=generator.device)
        return draws | {"other": ((torch.arange(count, device=steps.device) + steps) % count).to(device)}

    def __call__(self, model, batch: Batch) -> ObjectiveOutput:
        """Run the `AlignedDenoiser` `model` on the batch, which is the whole one if it has no `whole`."""
        whole, draws = batch.whole or batch, dict(batch.draws)
        if batch.whole and len(whole.x) == 1:
            raise UserError("contrastive-flow-matching needs another sample in each step: set train.batch_size above 1")
        other = draws.pop("other")
        draws |= {"other_x": whole.x[other], "other_noise": whole.draws["noise"][other]}
        return super().__call__(model, replace(batch, draws=draws))

    def corrupt(
        self, x: Tensor, t: Tensor, noise: Tensor, other_x: Tensor | None = None, other_noise: Tensor | None = None
    ) -> Noisy:
        """As `FlowMatching.corrupt`; with the data and noise (B, C, H, W) of the others, which `loss` needs, a
        `ContrastiveNoisy`."""
        noisy = super().corrupt(x, t, noise)
        if other_x is None or other_noise is None:
            return noisy
        away = self.path.target(other_x, other_noise, t, self.unit)
        away = self.path.convert(away, noisy.x_t, t, self.unit, self.prediction)
        return ContrastiveNoisy(noisy.x_t, t, noisy.target, noisy.weight, away)

    def loss(self, prediction: Tensor, noisy: ContrastiveNoisy) -> Tensor:  # type: ignore[override]
        """The contrastive loss of each image, (B,) in float32; it may be negative."""
        contrast = super().loss(prediction, replace(noisy, target=noisy.away))
        return super().loss(prediction, noisy) - self.contrast * contrast

    def velocity_model(self, denoiser) -> VelocityModel:
        """The denoiser as a velocity, which guidance corrects if `data_mean` is known."""
        return super().velocity_model(denoiser) if self.data_mean is None else ContrastiveVelocity(self, denoiser)


class ContrastiveVelocity(VelocityModel):
    """The velocity of a denoiser that was trained contrastively, with what guidance makes of it first."""

    def __init__(self, objective: ContrastiveFlowMatching, denoiser):
        super().__init__(denoiser, objective.path, objective.prediction)
        self.contrast, self.unit, self.mean = objective.contrast, objective.unit, objective.data_mean
        low, high = self.path.safe_interval(self.unit, "velocity")
        self.time_range = max(low, self.time_range[0]), min(high, self.time_range[1])

    def before_guidance(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """(1 - contrast) v + contrast v_mean for the velocity v at x (B, C, H, W) and t (B,): what plain flow matching
        would have learnt."""
        assert self.mean is not None
        self.mean = self.mean.to(v)  # copied to the device once
        mean = self.mean.expand_as(v)
        away = self.path.target(mean, torch.zeros_like(mean), t.to(v), self.unit)
        away = self.path.convert(away, x.to(v), t.to(v), self.unit, "velocity")
        return (1 - self.contrast) * v + self.contrast * away
