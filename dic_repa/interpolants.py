"""Interpolant paths between data (t = 0) and noise (t = 1), and the conversions between what a denoiser may predict.

Along a path x_t = alpha(t) x + sigma(t) eps, and every quantity that a denoiser predicts is linear in x and eps:

    data      x
    noise     eps
    velocity  v = alpha'(t) x + sigma'(t) eps
    score     s = grad log p_t(x_t) = -eps / sigma(t)          (in expectation over x and eps given x_t)

so x_t and any one of them determine the others. With D = alpha sigma' - alpha' sigma (positive: the noise grows):

    from velocity   x = (sigma' x_t - sigma v) / D             eps = (alpha v - alpha' x_t) / D
    from data       eps = (x_t - alpha x) / sigma              v = (sigma' x_t - D x) / sigma
    from noise      x = (x_t - sigma eps) / alpha              v = (alpha' x_t + D eps) / alpha
    from score      eps = -sigma s, then as from noise
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.registry import Registry

PREDICTIONS = ("velocity", "noise", "score", "data")

paths = Registry("interpolant", key="objective.options.path")


def check_prediction(name: str) -> str:
    """`name` if it is a quantity that a denoiser may predict; otherwise a UserError."""
    if name not in PREDICTIONS:
        raise unknown_name("prediction", name, PREDICTIONS)
    return name


@dataclass(frozen=True)
class Coefficients:
    """A path's coefficients at some times, each of the times' shape, and their derivatives by t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def determinant(self) -> Tensor:
        """D = alpha sigma' - alpha' sigma."""
        return self.alpha * self.d_sigma - self.d_alpha * self.sigma


@dataclass(frozen=True)
class PathSample:
    """A point on the path and the velocity of its (x, noise) pair, both of x's shape."""

    x_t: Tensor
    velocity: Tensor


class Interpolant:
    """A pair alpha(t), sigma(t) with alpha(0) = 1, sigma(0) = 0 and (almost) pure noise at t = 1.

    A subclass defines `coefficients` and `time_at_ratio`, and says where it is singular.
    """

    noise_scale = 1.0  # the state at t = 1 is this times standard normal noise
    alpha_vanishes = True  # alpha(1) = 0, so nothing may be divided by alpha there
    d_sigma_diverges = False  # sigma'(0) is infinite, so there is no velocity there

    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma and their derivatives at the times `t` (any shape, floating)."""
        raise NotImplementedError

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """The time t at which sigma(t) / alpha(t) is `ratio` (the noise level in the convention of EDM)."""
        raise NotImplementedError

    def sample(self, x: Tensor, noise: Tensor, t: Tensor) -> PathSample:
        """x_t = alpha x + sigma noise and v = alpha' x + sigma' noise for x, noise (B, ...) and t (B,)."""
        c = self.coefficients(expand_as(t, x))
        return PathSample(c.alpha * x + c.sigma * noise, c.d_alpha * x + c.d_sigma * noise)

    def target(self, x: Tensor, noise: Tensor, t: Tensor, prediction: str) -> Tensor:
        """What a denoiser that predicts `prediction` should give for the pair (x, noise) at t (B,)."""
        check_prediction(prediction)
        if prediction in ("data", "noise"):
            return x if prediction == "data" else noise
        if prediction == "velocity":
            return self.sample(x, noise, t).velocity
        return -noise / self.coefficients(expand_as(t, x)).sigma

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor, source: str, target: str) -> Tensor:
        """Turn a prediction of `source` at x_t (B, ...) and t (B,) into one of `target`, by the module's equations.

        Outside `safe_interval(source, target)` the result is large or not finite.
        """
        check_prediction(source)
        check_prediction(target)
        if source == target:
            return value
        c = self.coefficients(expand_as(t, x_t))
        # The score is the noise in other units; by way of the noise, nothing is divided without need.
        if source == "score":
            source, value = "noise", -c.sigma * value
        goal = "noise" if target == "score" else target
        if source != goal:
            by_value, by_state = _conversion(c, source, goal)
            value = by_value * value + by_state * x_t
        return -value / c.sigma if target == "score" else value

    def jacobian(self, t: Tensor, source: str, target: str) -> Tensor:
        """d target / d source at a fixed x_t, like the times `t`: what an error of one is in units of the other."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return self.convert(one, zero, t, source, target)

    def safe_interval(self, source: str, target: str, eps: float = 1e-3) -> tuple[float, float]:
        """The times (t_min, t_max) between which `convert` from `source` to `target` divides by nothing smaller than
        sigma(eps) or alpha(1 - eps), and a velocity is finite if one is involved. A score counts as divided by sigma:
        this is also where it can be trained.
        """
        by_sigma = "score" in (source, target) or (source == "data" and target != "data")
        by_sigma |= self.d_sigma_diverges and "velocity" in (source, target)
        by_alpha = self.alpha_vanishes and source in ("noise", "score") and target in ("data", "velocity")
        return (eps if by_sigma else 0.0, 1.0 - eps if by_alpha else 1.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in vars(self).items())})"


def _conversion(c: Coefficients, source: str, target: str) -> tuple[Tensor, Tensor]:
    """Factors (p, q) with target = p source + q x_t, both among data, noise and velocity.

    With source = a x + b eps, target = e x + f eps and x_t = alpha x + sigma eps, Cramer's rule gives
    p = (e sigma - f alpha) / (a sigma - b alpha) and q = (a f - b e) / (a sigma - b alpha).
    """
    rows: dict[str, tuple[float | Tensor, float | Tensor]]
    rows = {"data": (1.0, 0.0), "noise": (0.0, 1.0), "velocity": (c.d_alpha, c.d_sigma)}
    (a, b), (e, f) = rows[source], rows[target]
    determinant = a * c.sigma - b * c.alpha
    return (e * c.sigma - f * c.alpha) / determinant, (a * f - b * e) / determinant


@paths.register("linear")
class LinearPath(Interpolant):
    """alpha = 1 - t, sigma = noise_scale t (rectified flow; the path of SiT, REPA and U-REPA, with 1).

    JiT has wider noise for larger images: 1 at 256 px, 2 at 512 (Li and He 2025, arXiv 2511.13720). `sample_ode` and
    its like then start from noise_scale times standard normal noise.
    """

    def __init__(self, noise_scale: float = 1.0):
        if not noise_scale > 0:
            raise UserError(f"noise_scale {noise_scale}: give a number above 0, 1 for standard normal noise")
        self.noise_scale = noise_scale

    def coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(1 - t, self.noise_scale * t, -one, self.noise_scale * one)

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        return ratio / (self.noise_scale + ratio)


@paths.register("cosine")
class CosinePath(Interpolant):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (the generalised variance-preserving path of SiT)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        half_pi = math.pi / 2
        # cos(pi/2) is not zero in floating point; sin of what is left of the path is.
        alpha, sigma = torch.sin(half_pi * (1 - t)), torch.sin(half_pi * t)
        return Coefficients(alpha, sigma, -half_pi * sigma, half_pi * alpha)

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) * (2 / math.pi)


@paths.register("vp")
class VPPath(Interpolant):
    """The variance-preserving diffusion with beta(t) = beta_min + t (beta_max - beta_min):

    log alpha = -1/2 int_0^t beta = -1/4 t^2 (beta_max - beta_min) - 1/2 t beta_min,   sigma^2 = 1 - alpha^2.

    sigma grows like the root of t, so its derivative diverges at t = 0; alpha(1) = 0.0066 does not vanish.
    """

    alpha_vanishes = False
    d_sigma_diverges = True

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def coefficients(self, t: Tensor) -> Coefficients:
        rise = self.beta_max - self.beta_min
        log_alpha = -0.25 * rise * t**2 - 0.5 * self.beta_min * t
        alpha = torch.exp(log_alpha)
        sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
        d_alpha = -0.5 * (self.beta_min + rise * t) * alpha
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        # ratio^2 + 1 = 1 / alpha^2, so int_0^t beta = log1p(ratio^2): a quadratic in t, solved without cancellation.
        integral = torch.log1p(ratio**2)
        rise = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * rise * integral))


def path_of(model: object) -> Interpolant | None:
    """The path that a model or field names as its `path`; None if it has none, or means something else by it."""
    path = getattr(model, "path", None)
    return path if isinstance(path, Interpolant) else None


def expand_as(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) as (B, 1, ..., 1), to broadcast against x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
