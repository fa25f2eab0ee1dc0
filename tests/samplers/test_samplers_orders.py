"""Every solver converges as fast as the catalogue says, on Gaussian data: the flow and the SDE's moments are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture

from dic_repa.interpolants import CosinePath, LinearPath, VPPath
from dic_repa.samplers import list_solvers, sample_ode, sample_sde
from dic_repa.samplers.sde import euler_maruyama

MEAN, STD = 0.7, 0.5
DATA = GaussianMixture([[MEAN]], [1.0], STD)
START, END = 0.9, 0.1
STARTS = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
FIXED = [info for info in list_solvers("ode") if info.kind == "fixed" and info.name != "meanflow"]


def deviation(path, t):
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return c.alpha.item() * MEAN, math.hypot(c.alpha.item() * STD, c.sigma.item())


def flow(path, x):
    """Where the ODE takes x from START to END: a Gaussian's flow keeps the standardised value."""
    (mean0, std0), (mean1, std1) = deviation(path, START), deviation(path, END)
    return mean1 + std1 * (x - mean0) / std0


def slope(steps, errors):
    """Of log error against log step size."""
    return np.polyfit(-np.log(steps), np.log(errors), 1)[0]


def times(steps, power=1.0):
    ramp = np.linspace(0, 1, steps + 1) ** power
    return (START + (END - START) * ramp).tolist()


def ode_error(solver, path, steps, power=1.0):
    x = sample_ode(DATA.velocity(path), STARTS, solver, times=times(steps, power))
    return (x - flow(path, STARTS)).abs().max().item()


# Not the linear path: on Gaussian data the midpoint rule gains an order there.
@pytest.mark.slow
@pytest.mark.parametrize("path", [CosinePath(), VPPath()], ids=["cosine", "vp"])
@pytest.mark.parametrize("info", FIXED, ids=lambda info: info.name)
def test_order_of_ode_solvers(info, path):
    # Adams' methods of fourth order come near their order at finer steps.
    steps = [512, 724, 1024] if info.name.endswith("adams") else [256, 362, 512]
    errors = [ode_error(info.name, path, n) for n in steps]
    assert abs(slope(steps, errors) - info.order) < 0.15, errors


@pytest.mark.parametrize("name", ["euler", "heun", "midpoint", "ab2", "ab3", "dpmpp-2m", "dpmpp-3m", "rk4"])
def test_order_on_unequal_steps(name):
    info = next(info for info in FIXED if info.name == name)
    steps = [128, 181, 256]
    errors = [ode_error(name, CosinePath(), n, power=1.5) for n in steps]
    assert abs(slope(steps, errors) - info.order) < 0.15, errors


@pytest.mark.parametrize("name", ["heun", "ab2", "ab3", "dpmpp-2m", "heun3"])
def test_order_from_pure_noise_to_data(name):
    """Over all of [0, 1], where sigma and alpha vanish at the ends. dpmpp-2m loses a logarithm there."""
    info = next(info for info in FIXED if info.name == name)
    path, steps = LinearPath(), [256, 512, 1024]
    exact = MEAN + STD * STARTS
    errors = [(sample_ode(DATA.velocity(path), STARTS, name, n) - exact).abs().max().item() for n in steps]
    assert abs(slope(steps, errors) - info.order) < 0.15, errors


@pytest.mark.parametrize("info", [i for i in list_solvers("ode") if i.kind == "adaptive"], ids=lambda info: info.name)
def test_adaptive_solvers_keep_their_tolerance(info):
    for tolerance in (1e-3, 1e-6):
        x = sample_ode(
            DATA.velocity(CosinePath()), STARTS, info.name, times=[START, END], rtol=tolerance, atol=tolerance
        )
        error = (x - flow(CosinePath(), STARTS)).abs().max()
        # The error estimate of fehlberg2 is about a hundredth of its error.
        assert error < (200 if info.name == "fehlberg2" else 20) * tolerance


def sde_moments(solver, path, steps, diffusion="linear"):
    """Mean and standard deviation at END of an SDE solver's samples, exactly: on Gaussian data a step is affine in the
    state and its noise, so runs from 0, from 1, and with a unit of noise at each of the steps give all of it."""
    grid = times(steps)
    starts = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    starts[1] = 1

    def one_hot(step, like):
        out = torch.zeros_like(like)
        out[step + 2] = 1
        return out

    x = sample_sde(
        DATA.velocity(path), starts, path, solver, times=grid, noise_fn=one_hot, last_step="none", diffusion=diffusion
    ).flatten()
    mean0, std0 = deviation(path, START)
    response = x[1:] - x[0]
    return x[0] + response[0] * mean0, torch.cat([response[:1] * std0, response[1:]]).norm()


@pytest.mark.parametrize("info", list_solvers("sde"), ids=lambda info: info.name)
def test_weak_order_of_sde_solvers(info):
    path, steps = CosinePath(), [128, 181, 256]
    mean, std = deviation(path, END)
    moments = [sde_moments(info.name, path, n) for n in steps]
    assert abs(slope(steps, [abs(got.item() - std) for _, got in moments]) - info.order) < 0.15
    errors = [abs(got.item() - mean) for got, _ in moments]
    if info.name == "ou":
        assert max(errors) < 1e-12  # it gets the mean of Gaussian data right in any number of steps
    else:
        # The mean of Gaussian data is the ODE's, of which SiT's heun is of second order like any other.
        assert abs(slope(steps, errors) - (2 if info.name == "heun-sit" else info.order)) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("form", ["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"])
def test_every_diffusion_form_has_the_paths_marginals(form):
    for path in (LinearPath(), CosinePath(), VPPath()):
        mean, std = deviation(path, END)
        for solver in ("stochastic_heun", "ou"):
            got_mean, got_std = sde_moments(solver, path, 400, form)
            assert abs(got_mean - mean) < 0.02, (path, solver)
            assert abs(got_std - std) < 0.02, (path, solver)


class GeometricBrownianMotion:
    """dx = growth x dT + volatility x dW with T = 1 - t, as the reverse SDE runs; its noise depends on the state."""

    growth, volatility = 0.5, 0.8

    def drift(self, x, t):
        return -self.growth * x

    def noise(self, x, t, s, z):
        return self.volatility * x * (t - s) ** 0.5 * z


def test_strong_and_weak_order_of_euler_maruyama():
    sde, finest, steps = GeometricBrownianMotion(), 512, [32, 64, 128, 256, 512]
    z = torch.randn(finest, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    brownian = z.sum(0) / finest**0.5
    exact = torch.exp(sde.growth - sde.volatility**2 / 2 + sde.volatility * brownian)
    strong, weak = [], []
    for n in steps:
        grid = np.linspace(1, 0, n + 1)
        # Sums of the finest increments: all step sizes see one Brownian motion.
        coarse = z.reshape(n, finest // n, -1).sum(1) / (finest // n) ** 0.5
        x, mean = torch.ones(4000, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        for t, s, noise in zip(grid, grid[1:], coarse):
            x = euler_maruyama(sde, x, t, s, noise)
            mean = euler_maruyama(sde, mean, t, s, torch.zeros(1))  # linear in the noise, so this is the expectation
        strong.append((x - exact).abs().mean().item())
        weak.append(abs(mean.item() - math.exp(sde.growth)))
    assert abs(slope(steps, strong) - 0.5) < 0.15
    assert abs(slope(steps, weak) - 1) < 0.15
