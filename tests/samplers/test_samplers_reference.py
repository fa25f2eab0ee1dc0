"""The samplers against the REPA authors' own and SiT's, on Gaussian classes whose velocity is known exactly."""

from __future__ import annotations

import pytest
import torch
from places import FIXTURES
from safetensors.torch import load_file

from dic_repa.interpolants import paths
from dic_repa.samplers import Guidance, sample_ode, sample_sde

REFERENCE = load_file(FIXTURES / "repa_reference.safetensors")
SIT = load_file(FIXTURES / "sit_dit_reference.safetensors")
VARIANCE = 0.25


class GaussianClasses:
    """Data of class c is N(mu[c], 0.25); the last row of mu is the null class."""

    num_classes = 3

    def __init__(self, path):
        self.path = path

    def __call__(self, x, t, y):
        c = self.path.coefficients(t.reshape(-1, 1, 1, 1))
        mu = REFERENCE["mu"][y]
        residual = (x - c.alpha * mu) / (VARIANCE * c.alpha**2 + c.sigma**2)
        return c.d_alpha * (mu + c.alpha * VARIANCE * residual) + c.d_sigma * c.sigma * residual


def field(path, scale):
    return Guidance(scale=scale, interval=(0.0, 0.7)).bind(GaussianClasses(path), torch.arange(3))


@pytest.mark.parametrize("scale", [1.0, 1.8])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_ode(solver, scale):
    got = sample_ode(field(paths.create("linear"), scale), REFERENCE["z"], solver=solver, steps=20)
    torch.testing.assert_close(got, REFERENCE[f"ode.{solver}.linear.cfg{scale}"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 1.8])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_sde(name, scale):
    path = paths.create(name)
    got = sample_sde(
        field(path, scale),
        REFERENCE["z"],
        path=path,
        steps=20,
        noise_fn=lambda step, like: REFERENCE["sde.noise"][step],
    )
    torch.testing.assert_close(got, REFERENCE[f"sde.euler_maruyama.{name}.cfg{scale}"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", ["linear", "sigma", "decreasing"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_heun_of_sit(name, form):
    """Against SiT's own, with the same noise."""
    path = paths.create(name)

    def velocity(x, t):
        c = path.coefficients(t.reshape(-1, 1, 1, 1))
        residual = (x - c.alpha * SIT["sit.mu"]) / (VARIANCE * c.alpha**2 + c.sigma**2)
        return c.d_alpha * (SIT["sit.mu"] + c.alpha * VARIANCE * residual) + c.d_sigma * c.sigma * residual

    given = {"steps": 20, "diffusion": form, "noise_fn": lambda step, like: SIT["sit.noise"][step]}
    got = sample_sde(velocity, SIT["sit.z"], path, "heun-sit", **given)
    torch.testing.assert_close(got, SIT[f"sit.heun.{name}.{form}"], rtol=1e-5, atol=1e-5)  # its times are float32
    assert (sample_sde(velocity, SIT["sit.z"], path, "stochastic_heun", **given) - got).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_sde_reaches_the_exact_mean_and_variance(name):
    path, count = paths.create(name), 4000
    labels = torch.zeros(count, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)

    def normal(step=None, like=None):
        return torch.randn(count, 4, 2, 2, generator=generator, dtype=torch.float64)

    x = sample_sde(Guidance(scale=1.0).bind(GaussianClasses(path), labels), normal(), steps=250, noise_fn=normal)
    # Five standard errors over 16 dimensions, and the discretisation's bias, which is first order in the step.
    assert (x.mean(0) - REFERENCE["mu"][0]).abs().max() < 5 * (VARIANCE / count) ** 0.5 + 0.005
    assert (x.var(0) - VARIANCE).abs().mean() < 5 * VARIANCE * (2 / (16 * count)) ** 0.5 + 0.005
