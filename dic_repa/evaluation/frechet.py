"""The Fréchet distance of two sets of features, each taken as a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from dic_repa.errors import UserError


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the unbiased covariance (D, D), in float64, of features (N, D).

    Raises:
        UserError: for fewer than two rows, and numbers that are not finite.
    """
    if features.ndim != 2:
        raise UserError(f"a covariance takes features (N, D) of at least two samples, not {tuple(features.shape)}")
    running = RunningStatistics()
    running.update(features)
    return running.result()


class RunningStatistics:
    """The mean and covariance of features that come in batches, in float64.

    Batches are merged by Chan's formula: squares are summed about each batch's own mean, so that nothing cancels out
    when the mean is large against the spread.
    """

    def __init__(self):
        self.count = 0
        self.mean = self.squares = torch.empty(0)  # squares: the sum over samples of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """Add a batch (N, D); a UserError if it holds NaN or infinity."""
        for part in features.split(8192):  # a bounded copy in float64
            rows = (part.cpu() if part.device.type == "mps" else part).double()  # Apple's GPUs have no float64
            if not rows.isfinite().all():
                raise UserError("the features hold NaN or infinity; look at the images that they come from")
            count, mean = len(rows), rows.mean(dim=0)
            centred = rows - mean
            squares = centred.mT @ centred
            if not self.count:
                self.count, self.mean, self.squares = count, mean, squares
                continue
            total, shift = self.count + count, mean - self.mean
            self.squares += squares + torch.outer(shift, shift) * (self.count * count / total)
            self.mean += shift * (count / total)
            self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """The mean (D,) and the unbiased covariance (D, D); a UserError for fewer than two samples."""
        if self.count < 2:
            raise UserError(f"a covariance takes features (N, D) of at least two samples, not {self.count}")
        return self.mean, self.squares / (self.count - 1)


class FrechetDistance:
    """The distance to one Gaussian, `FrechetDistance(mean, cov)(other_mean, other_cov)`: its root is taken once.

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), for means (D,) and covariances A and B (D, D), in float64.
    The last trace is that of (A^(1/2) B A^(1/2))^(1/2): it has the same eigenvalues but is symmetric, so that it exists
    for singular covariances too. A UserError if the shapes do not fit.
    """

    def __init__(self, mean: Tensor, cov: Tensor):
        self.mean, self.cov = mean.double(), cov.double()
        if self.mean.ndim != 1 or self.cov.shape != (len(self.mean),) * 2:
            raise _misfit(mean, cov)
        values, vectors = torch.linalg.eigh(self.cov)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT

    def __call__(self, mean: Tensor, cov: Tensor) -> float:
        mean, cov = mean.double(), cov.double()
        if mean.shape != self.mean.shape or cov.shape != self.cov.shape:
            raise _misfit(self.mean, self.cov, mean, cov)
        product = self.root @ cov @ self.root
        # Rounding makes zero eigenvalues a little negative, and leaves the product a little asymmetric.
        trace_of_root = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0).sqrt().sum()
        distance = (mean - self.mean).square().sum() + self.cov.trace() + cov.trace() - 2 * trace_of_root
        return max(distance.item(), 0.0)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The Fréchet distance of two Gaussians, see `FrechetDistance`."""
    return FrechetDistance(mean_a, cov_a)(mean_b, cov_b)


def _misfit(*parts: Tensor) -> UserError:
    shapes = ", ".join(str(tuple(part.shape)) for part in parts)
    return UserError(f"means and covariances must be (D,), (D, D), (D,), (D, D) of one D, not {shapes}")
