"""A data distribution whose every prediction, moment and likelihood is known: an isotropic Gaussian mixture."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class GaussianMixture:
    """sum_k weights[k] N(means[k], std^2 I) over vectors (D,), as images (B, D, 1, 1)."""

    def __init__(self, means, weights, std: float):
        self.means = torch.tensor(means, dtype=torch.float64)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.std = std

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def variance(self) -> Tensor:
        """Of each coordinate."""
        return self.std**2 + self.weights @ self.means**2 - self.mean**2

    def log_prob(self, x: Tensor) -> Tensor:
        squares = (x.flatten(1)[:, None] - self.means).square().sum(-1) / self.std**2
        constant = self.means.shape[1] * math.log(2 * math.pi * self.std**2)
        return torch.logsumexp(self.weights.log() - 0.5 * (squares + constant), 1)

    def expectations(self, path, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x | x_t] and E[eps | x_t], by Bayes over the components."""
        c = path.coefficients(t.double().reshape(-1, 1, 1))
        residual = x.double().flatten(1)[:, None] - c.alpha * self.means
        variance = (c.alpha * self.std) ** 2 + c.sigma**2
        share = torch.softmax(self.weights.log() - 0.5 * residual.square().sum(-1) / variance[..., 0], 1)[..., None]
        data = (share * (self.means + c.alpha * self.std**2 / variance * residual)).sum(1)
        noise = (share * c.sigma / variance * residual).sum(1)
        return data.reshape(x.shape), noise.reshape(x.shape)

    def predict(self, path, x: Tensor, t: Tensor, prediction: str) -> Tensor:
        data, noise = self.expectations(path, x, t)
        return path.target(data, noise, t, prediction).to(x.dtype)

    def velocity(self, path):
        """The velocity field (x, t) of a path from this distribution."""
        field = lambda x, t: self.predict(path, x, t, "velocity")  # noqa: E731
        field.path = path
        return field

    def denoiser(self, path, prediction: str):
        """A denoiser (x, t, y) which predicts exactly."""
        return lambda x, t, y: self.predict(path, x, t, prediction)
