"""Flow matching: regression on a path's velocity (or noise, score, data) at random times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant, check_prediction, paths
from dic_repa.objectives.base import Denoising, Noisy, VelocityModel, objectives
from dic_repa.objectives.time_sampling import shift_time, time_samplings
from dic_repa.objectives.weighting import weightings
from dic_repa.samplers.ddpm import split_output


@objectives.register("flow-matching")
class FlowMatching(Denoising):
    """E_t w(t) |prediction(x_t, t) - target|^2 with x_t = alpha(t) x + sigma(t) noise (Lipman et al. 2023; SiT).

    Args:
        path: 'linear', 'cosine' or 'vp'.
        time: how t is drawn: 'uniform', 'logit-normal' or 'log-normal' (both with mean and std).
        prediction: what the denoiser gives: 'velocity', 'noise', 'score' or 'data'.
        weighting: w: 'none', 'noise', 'velocity', 'likelihood' or 'min-snr-gamma' (gamma).
        shift: multiplies t / (1 - t) of every drawn time; see `resolution_shift`.

    `path`, `time` and `weighting` are names, mappings of `name` and arguments, or objects. Raises UserError for unknown
    names and a shift that is not positive.
    """

    def __init__(
        self,
        path: Interpolant | str | dict = "linear",
        time="uniform",
        prediction: str = "velocity",
        weighting="none",
        shift: float = 1.0,
    ):
        self.path = paths.create(path)
        self.time = time_samplings.create(time)
        self.prediction = check_prediction(prediction)
        self.weighting = weightings.create(weighting)
        if not shift > 0:
            raise UserError(f"shift {shift}: give a number above 0, 1 for none")
        self.shift = shift
        ranges = [self.path.safe_interval(prediction, unit) for unit in (prediction, self.weighting.unit or prediction)]
        if self.weighting.unit:
            ranges.append(self.path.safe_interval("noise", "velocity"))  # weights may divide by alpha themselves
        self.time_range = max(low for low, _ in ranges), min(high for _, high in ranges)

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Times `t` (B,) and `noise` (B, C, H, W) for a whole step's batch of `shape` (B, C, H, W).

        Drawn in float32 where the generator lives, then moved, so that a CPU generator gives every device the same.
        Times are drawn within the range where the target and its weight are finite.
        """
        low, high = self.time_range
        t = shift_time(self.time(shape[0], generator, self.path), self.shift).clamp(low, high)
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
        return {"t": t.to(device), "noise": noise.to(device)}

    def corrupt(self, x: Tensor, t: Tensor, noise: Tensor) -> Noisy:
        """x_t, the target and its weight for data x (B, C, H, W), times t (B,) and noise (B, C, H, W)."""
        target = self.path.target(x, noise, t, self.prediction)
        weight = self.weighting(self.path, t, self.prediction)
        return Noisy(self.path.sample(x, noise, t).x_t, t, target, weight)

    def loss(self, prediction: Tensor, noisy: Noisy) -> Tensor:
        """The weighted mean squared error of each image, (B,) in float32.

        Args:
            prediction: (B, C, H, W), or (B, 2C, H, W) of a `learn_sigma` denoiser, of which the first C count.
            noisy: what `corrupt` has made.

        Raises:
            UserError: for other counts of channels.
        """
        target = noisy.target.float()
        error = split_output(prediction, target.shape[1])[0].float() - target
        return noisy.weight * reduce(error.square(), "b ... -> b", "mean")

    def velocity_model(self, denoiser) -> VelocityModel:
        """The denoiser as a velocity (x, t, y) -> (B, C, H, W), which the samplers take."""
        return VelocityModel(denoiser, self.path, self.prediction)
