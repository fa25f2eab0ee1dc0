"""The Fréchet distance of two sets of features, each taken as a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from dic_repa.errors import UserError


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the unbiased covariance (D, D), in float64, of features (N, D).

    Raises UserError for fewer than two rows or numbers that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"a covariance takes features (N, D) of at least two samples, not {tuple(features.shape)}")
    features = features.double()
    if not features.isfinite().all():
        raise UserError("the features hold NaN or infinity; look at the images that they come from")
    return features.mean(dim=0), torch.cov(features.mT).reshape(features.shape[1], features.shape[1])


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), for means (D,) and covariances A and B (D, D),
    computed in float64.

    The last trace is that of (A^(1/2) B A^(1/2))^(1/2), which has the same eigenvalues as (A B)^(1/2) but is
    symmetric, so that it exists for singular covariances too. Raises UserError when the shapes do not fit.
    """
    mean_a, cov_a, mean_b, cov_b = (part.double() for part in (mean_a, cov_a, mean_b, cov_b))
    dim = mean_a.numel()
    if mean_a.shape != (dim,) or mean_b.shape != (dim,) or cov_a.shape != (dim, dim) or cov_b.shape != (dim, dim):
        shapes = ", ".join(str(tuple(part.shape)) for part in (mean_a, cov_a, mean_b, cov_b))
        raise UserError(f"means and covariances must be (D,), (D, D), (D,), (D, D) of one D, not {shapes}")
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    product = root_a @ cov_b @ root_a
    # Rounding makes zero eigenvalues a little negative, and leaves the product a little asymmetric.
    trace_of_root = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)
