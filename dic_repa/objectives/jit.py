"""JiT's objective: the denoiser gives clean data, its error counts as the velocity's (arXiv 2511.13720)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant
from dic_repa.objectives.base import Noisy, VelocityModel, objectives
from dic_repa.objectives.flow_matching import FlowMatching, LogitNormal

TIMES = LogitNormal(mean=0.8, std=0.8)  # the paper's -0.8, whose time is 1 at the data


@objectives.register("jit")
class JiT(FlowMatching):
    """Data prediction with the velocity's loss, for pixels (Li and He 2025, JiT).

    |v(prediction) - v|^2 with v(x) = (x_t - x) / max(t, floor) on the linear path: at times below `floor` neither
    training nor sampling divides by less (`t_eps` of the authors' code). Flow matching with `prediction: data` and
    `weighting: velocity` is the same with a floor of 0.001.

    Args:
        path: {name: linear, noise_scale: 2} at 512 px, as the paper has it; 1 at 256.
        time, shift: as in flow-matching; by default the paper's logit-normal times.
        floor: from 0.001 to below 1.

    Raises UserError for another floor.
    """

    def __init__(
        self, path: Interpolant | str | dict = "linear", time=TIMES, shift: float | str = 1.0, floor: float = 0.05
    ):
        super().__init__(path, time, "data", "velocity", shift)
        if not 0.001 <= floor < 1:
            raise UserError(f"floor {floor}: give a time from 0.001 to below 1")
        self.floor = floor
        self.time_range = self.path.safe_interval("velocity", "velocity")

    def corrupt(self, x: Tensor, t: Tensor, noise: Tensor) -> Noisy:
        """As `FlowMatching.corrupt`, weighted as at the time `floor` below it."""
        noisy = super().corrupt(x, t, noise)
        return replace(noisy, weight=self.weighting(self.path, t.clamp(min=self.floor), self.prediction))

    def velocity_model(self, denoiser) -> VelocityModel:
        return JiTVelocity(self, denoiser)


class JiTVelocity(VelocityModel):
    """Predicted data as a velocity, by the conversion of the time `floor` below it."""

    def __init__(self, objective: JiT, denoiser):
        super().__init__(denoiser, objective.path, objective.prediction)
        self.floor, self.time_range = objective.floor, objective.time_range

    def _velocity(self, value: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return super()._velocity(value, x, t.clamp(min=self.floor))
