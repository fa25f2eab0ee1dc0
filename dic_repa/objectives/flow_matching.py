"""Flow matching: regression on a path's velocity (or noise, score, data) at random times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.objectives.base import Noisy, VelocityModel, objectives, prediction_channels
from dic_repa.objectives.time_sampling import create_time_sampling
from dic_repa.paths import LinearPath, Path, check_prediction, create_path


@objectives.register("flow-matching")
class FlowMatching:
    """E_t w(t) |prediction(x_t, t) - target|^2 with x_t = alpha(t) x + sigma(t) noise (Lipman et al. 2023; SiT).

    `path` and `time` are names or objects; `prediction` is 'velocity', 'noise', 'score' or 'data'.
    Raises UserError for unknown names.
    """

    def __init__(self, path: Path | str | None = None, time="uniform", prediction="velocity", weighting="none"):
        self.path = LinearPath() if path is None else create_path(path) if isinstance(path, str) else path
        self.time = create_time_sampling(time) if isinstance(time, str) else time
        self.prediction = check_prediction(prediction)
        if weighting != "none":
            raise UserError(f"unknown weighting '{weighting}'; known: none")
        self.time_range = self.path.safe_interval(prediction, prediction)

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Times (B,) and noise (B, C, H, W) for a whole step's batch of `shape` (B, C, H, W).

        Drawn in float32 where the generator lives, then moved, so that a CPU generator gives every device the same.
        Times are drawn within the range where the target is finite.
        """
        low, high = self.time_range
        t = low + (high - low) * self.time(shape[0], generator, self.path)
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
        return t.to(device), noise.to(device)

    def corrupt(self, x: Tensor, t: Tensor, noise: Tensor) -> Noisy:
        """x_t and the target for data x (B, C, H, W), times t (B,) and noise (B, C, H, W)."""
        x_t = self.path.sample(x, noise, t).x_t
        return Noisy(x_t, t, self.path.target(x, noise, t, self.prediction), torch.ones_like(t))

    def loss(self, prediction: Tensor, noisy: Noisy) -> Tensor:
        """The weighted mean squared error, a float32 scalar. `prediction` is (B, C, H, W), or (B, 2C, H, W) of a
        `learn_sigma` denoiser, of which the first C count; other channel counts are a UserError."""
        target = noisy.target.float()
        error = prediction_channels(prediction, target.shape[1]).float() - target
        return (noisy.weight * error.square().flatten(1).mean(1)).mean()

    def velocity_model(self, denoiser) -> VelocityModel:
        """The denoiser as a velocity (x, t, y) -> (B, C, H, W), which the samplers take."""
        return VelocityModel(denoiser, self.path, self.prediction)
