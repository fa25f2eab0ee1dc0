"""MeanFlow and its improved form: average velocities, with which a sample takes one or two evaluations.

The average velocity on the way of the ODE from a time t to r < t, u = (x_t - x_r) / (t - r), obeys
u = v - (t - r) du/dt, with the total derivative along the way, where x moves by v and r stays. So a denoiser that takes
both times (`two_times`) learns it from this identity alone, and gives the velocity at r = t.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from einops import reduce
from torch import Tensor

from dic_repa.conditions import condition_of_model, null_of
from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant, expand_as
from dic_repa.objectives.base import Batch, ObjectiveOutput, VelocityModel, objectives
from dic_repa.objectives.flow_matching import FlowMatching, LogitNormal
from dic_repa.samplers.ddpm import split_output

TIMES = LogitNormal(mean=-0.4, std=1.0)


class AverageVelocityModel(VelocityModel):
    """A denoiser as (x, t, y) -> velocity at t (B,), or average velocity between the times (t, r) (B, 2)."""

    two_times = True


@objectives.register("meanflow")
class MeanFlow(FlowMatching):
    """MeanFlow: average velocities, for samples in 1 or 2 evaluations (Geng et al. 2025, arXiv 2505.13447).

    The loss of an image is |e|^2 / (|e|^2 + c)^p, with e = u(x_t, r, t) - (v_g - (t - r) du/dt), summed over the image,
    and no gradient of the denominator or the target. du/dt is that along (v_g, 1, 0) of (x_t, t, r), in float32
    whatever the precision. With p = 1 all images count alike, and the loss is nearly 1 from the first step on;
    the log has the mean of |e|^2 over all numbers as `squared_error`.

    Guidance is learnt (eq. 21): v_g = omega v + (1 - omega - kappa) u(x_t, t, t, null) + kappa u(x_t, t, t, y), with
    the velocity v of the pair of data and noise, as classifier-free guidance of scale omega / (1 - kappa) would have
    it. It takes a pass for each of u. Rows without a condition learn v, and label dropout must give some.

    Args:
        time: how t and r are drawn, of which t is the larger.
        span_share: of the rows of a batch have r < t; by default a quarter, of improved-meanflow half, as the papers
            have it. In the others u is the velocity.
        p, c: of the loss, see above.
        omega, kappa: of the guidance; 1 and 0 for none. The defaults are those of MeanFlow-B/2 and M/2; L/2 and XL/2
            have omega 0.2, kappa 0.92 and the intervals (0, 0.8) and (0, 0.75).
        interval: the times (low, high) at which guidance acts.
        path, shift: as in flow-matching; paths with a velocity at all of [0, 1].

    Raises UserError for values out of their ranges, and for a denoiser without `two_times`.
    """

    usual_share = 0.25
    along_pair = True  # whether x moves in du/dt by the guided velocity of the pair, or by the network's own

    def __init__(
        self,
        path: Interpolant | str | dict = "linear",
        time: Any = TIMES,
        span_share: float | None = None,
        p: float = 1.0,
        c: float = 0.01,
        omega: float = 1.0,
        kappa: float = 0.5,
        interval: Sequence[float] = (0.0, 1.0),
        shift: float | str = 1.0,
    ):
        super().__init__(path, time, shift=shift)
        if self.time_range != (0.0, 1.0):
            raise UserError("average velocities need a path with a velocity at all times; take linear or cosine")
        span_share = self.usual_share if span_share is None else span_share
        if not 0 <= span_share <= 1:
            raise UserError(f"span_share {span_share}: give a share between 0 and 1, such as 0.25")
        if not (c > 0 and p >= 0):
            raise UserError(f"p {p} and c {c}: give a p of at least 0 and a c above 0")
        if not (omega > 0 and 0 <= kappa < 1):
            raise UserError(f"omega {omega} and kappa {kappa}: give an omega above 0 and a kappa in [0, 1)")
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise UserError(f"interval {list(interval)}: give (low, high) with 0 <= low <= high <= 1")
        self.span_share, self.p, self.c = span_share, p, c
        self.omega, self.kappa, self.interval = omega, kappa, tuple(interval)

    def check_denoiser(self, denoiser: Any) -> None:
        """A UserError for a denoiser of one time."""
        if not getattr(denoiser, "two_times", False):
            raise UserError("this objective needs a denoiser that takes two times: set model.options.two_times to true")

    @property
    def guided(self) -> bool:
        """Whether guidance is learnt."""
        return self.omega != 1 or self.kappa != 0

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """`t`, `r` (B,) and `noise` (B, C, H, W) for a whole step's batch of `shape`; see `FlowMatching.draw`."""
        draws = super().draw(shape, generator, device)
        first, second = draws["t"], self.draw_times(shape, generator).to(draws["t"].device)
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        rows = spanning_rows(self.span_share, shape[0], t.device)
        return draws | {"t": t, "r": t.index_copy(0, rows, r[rows])}

    def __call__(self, model: Any, batch: Batch) -> ObjectiveOutput:
        """Run the `AlignedDenoiser` `model` on the batch: as many rows as were drawn, or one of equal parts of them."""
        t, r, noise = (batch.draws[name] for name in ("t", "r", "noise"))
        noisy = self.corrupt(batch.x, t, noise)
        times = torch.stack([t, r], dim=1)
        target = self.average_target(model, noisy.x_t, noisy.target, times, batch.y)
        out = model(noisy.x_t, times, batch.y, t)
        error = split_output(out.prediction, target.shape[1])[0].to(target.dtype) - target
        squared = reduce(error.square(), "b ... -> b", "sum")
        told = {"squared_error": squared / error[0].numel()}
        return ObjectiveOutput(self.adaptive(squared), t, out.projections, told=told)

    def adaptive(self, squared: Tensor) -> Tensor:
        """The loss (B,) of squared errors (B,)."""
        return squared / (squared.detach() + self.c) ** self.p

    @torch.no_grad()
    def average_target(self, model: Any, x_t: Tensor, velocity: Tensor, times: Tensor, y: Tensor) -> Tensor:
        """What u should be at x_t and the times (t, r) (B, 2) of pairs with this `velocity`, all (B, C, H, W)."""
        target = self.guide(model, x_t, velocity, times[:, 0], y)
        rows = spanning_rows(self.span_share, len(x_t), x_t.device)
        if not is_whole(self.span_share * len(x_t)):
            rows = torch.arange(len(x_t), device=x_t.device)  # of such a part of a batch they are others each time
        if len(rows):
            pair, tangent = times[rows], target[rows] if self.along_pair else None
            change = bare(model).derivative(x_t[rows], pair, y[rows], tangent)
            target[rows] -= expand_as(pair[:, 0] - pair[:, 1], change) * change
        return target

    def guide(self, model: Any, x_t: Tensor, velocity: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """v_g (B, C, H, W) in place of a pair's `velocity`, a new tensor."""
        denoiser = bare(model).denoiser
        null_of_rows, condition = null_of(denoiser), condition_of_model(denoiser)
        if not self.guided or null_of_rows is None or (condition and condition.kind == "none"):
            return velocity.clone()
        null = null_of_rows(y)
        unguided = ((y == null) | (y.isnan() & null.isnan())).reshape(len(y), -1).all(1)
        low, high = self.interval
        unguided |= (t < low) | (t > high)
        guided = self.omega * velocity + (1 - self.omega - self.kappa) * own_velocity(model, x_t, t, null)
        if self.kappa:
            guided += self.kappa * own_velocity(model, x_t, t, y)
        return torch.where(expand_as(unguided, velocity), velocity, guided)

    def velocity_model(self, denoiser: Any) -> AverageVelocityModel:
        """The denoiser as a velocity, and as an average velocity for the solver 'meanflow'."""
        return AverageVelocityModel(denoiser, self.path, self.prediction)


@objectives.register("improved-meanflow")
class ImprovedMeanFlow(MeanFlow):
    """MeanFlow with the network's own velocity in du/dt (Geng et al. 2025, arXiv 2512.02012).

    du/dt is that along (u(x_t, t, t, y), 1, 0): unlike the velocity of a pair of data and noise it depends on x_t
    alone, so the error is that of a plain regression to v_g, by u + (t - r) du/dt. Of the paper's two forms this is the
    one without a second head. Guidance is fixed as in MeanFlow; the paper's model that takes its scale as an input is
    not here.
    """

    usual_share = 0.5
    along_pair = False


def bare(model: Any) -> Any:
    """The `AlignedDenoiser` without what wraps it for several processes."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def own_velocity(model: Any, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """u(x_t, t, t, y) (B, C, H, W) in float32 or better, of an `AlignedDenoiser`."""
    prediction = split_output(model(x_t, torch.stack([t, t], dim=1), y, t, False).prediction, x_t.shape[1])[0]
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def spanning_rows(share: float, count: int, device: torch.device | str | None = None) -> Tensor:
    """Which of `count` rows have r < t, whole numbers (n,): that share of them, evenly spread; a fixed choice, since
    rows are shuffled. Made on the `device`, which would be waited for if they came from the host."""
    nth = torch.arange(1, math.floor(count * share + 1e-9) + 1, dtype=torch.float64, device=device)
    return ((nth - 1e-9) / share).ceil().long() - 1


def is_whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-9
