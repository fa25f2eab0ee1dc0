"""The likelihood through the ODE against that of a Gaussian mixture."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_mixture import GaussianMixture

from dic_repa.errors import UserError
from dic_repa.interpolants import CosinePath, LinearPath, VPPath
from dic_repa.samplers import log_likelihood, sample_ode

MIXTURE = GaussianMixture([[0.8, -0.5], [-0.6, 0.4], [0.1, 0.9]], [0.5, 0.3, 0.2], 0.3)
POINTS = torch.tensor([[0.8, -0.5], [-0.5, 0.5], [0.2, 0.1], [1.2, 0.3], [0.0, 1.0]], dtype=torch.float64)
X = POINTS.reshape(-1, 2, 1, 1)


@pytest.mark.parametrize("path", [LinearPath(), LinearPath(2.0), CosinePath()], ids=repr)
def test_exact_divergence(path):
    got = log_likelihood(MIXTURE.velocity(path), X, divergence="exact", rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(got.log_prob, MIXTURE.log_prob(X), rtol=0, atol=1e-4)
    x = sample_ode(MIXTURE.velocity(path), path.noise_scale * got.noise, "dopri5", rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(x, X, rtol=0, atol=1e-4)


def test_vp_path():
    """With a larger beta, so that nothing but noise is left at t = 1, and from a time at which nearly none is there."""
    path = VPPath(beta_max=40)
    field = MIXTURE.velocity(path)
    got = log_likelihood(field, X, divergence="exact", times=[1e-3, 1.0], rtol=1e-7, atol=1e-7)
    # At t = 1e-3 the data are widened to sqrt(std^2 + sigma^2), which is what the likelihood is of.
    c = path.coefficients(torch.tensor(1e-3, dtype=torch.float64))
    widened = GaussianMixture((c.alpha * MIXTURE.means).tolist(), [0.5, 0.3, 0.2], math.hypot(c.alpha * 0.3, c.sigma))
    torch.testing.assert_close(got.log_prob, widened.log_prob(X), rtol=0, atol=1e-4)


def test_fixed_steps():
    got = log_likelihood(MIXTURE.velocity(LinearPath()), X, divergence="exact", solver="rk4", steps=100)
    torch.testing.assert_close(got.log_prob, MIXTURE.log_prob(X), rtol=0, atol=1e-4)
    assert got.nfe == 400


def test_hutchinson_is_unbiased_and_belongs_to_the_sample():
    field = MIXTURE.velocity(LinearPath())
    copies = X[:1].expand(400, -1, -1, -1)
    got = log_likelihood(field, copies, solver="rk4", steps=40).log_prob
    error = got.mean() - MIXTURE.log_prob(X[:1])
    assert got.std() > 0.01
    assert abs(error) < 5 * got.std() / 400**0.5
    part = log_likelihood(field, copies[3:5], solver="rk4", steps=40, indices=[3, 4]).log_prob
    torch.testing.assert_close(part, got[3:5])


def test_many_probes_vary_less():
    field = MIXTURE.velocity(LinearPath())
    copies = X[:1].expand(200, -1, -1, -1)
    deviations = [log_likelihood(field, copies, probes=n, solver="rk4", steps=20).log_prob.std() for n in (1, 16)]
    assert 2.5 < deviations[0] / deviations[1] < 6  # 4, by 16 independent probes


def test_bits_per_dimension_are_the_entropy():
    """Of a Gaussian in units of the bins of 8-bit images."""
    std = 0.2
    gaussian = GaussianMixture([[0.0]], [1.0], std)
    quantiles = torch.special.ndtri((torch.arange(500, dtype=torch.float64) + 0.5) / 500)
    x = (std * quantiles).reshape(-1, 1, 1, 1)
    got = log_likelihood(gaussian.velocity(LinearPath()), x, divergence="exact", solver="rk4", steps=50)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * (std * 128) ** 2)
    assert abs(got.bits_per_dim.mean() - entropy) < 0.01


def test_bad_input_is_told():
    field = MIXTURE.velocity(LinearPath())
    with pytest.raises(UserError, match="did you mean hutchinson"):
        log_likelihood(field, X, divergence="hutchison")
    with pytest.raises(UserError, match="probes"):
        log_likelihood(field, X, probes=0)
    with pytest.raises(UserError, match="noise to data only"):
        log_likelihood(field, X, solver="dpmpp-2m", steps=10)
    with pytest.raises(UserError, match="no_grad"):
        log_likelihood(torch.no_grad()(field), X)
